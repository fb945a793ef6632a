# libedgeprune_tensorrt: the plugins of the operators with the kernels in one file. Included where the kernels are built.
#
# Of TensorRT only headers are needed: nothing of it is linked, so one library serves every TensorRT, and TensorRT for
# RTX, whose major version is that of the headers.
option(EDGEPRUNE_WARNINGS_ARE_ERRORS "Refuse warnings in the plugins' sources" OFF)
set(TENSORRT_FOLDERS /usr/include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu /usr/include /usr/local/tensorrt/include)
set(TENSORRT_WHERE "a JetPack has them, NVIDIA's package libnvinfer-headers-dev and an unpacked "
  "TensorRT: give its folder with -DTENSORRT_ROOT= or the variable TENSORRT_ROOT")
string(CONCAT TENSORRT_WHERE ${TENSORRT_WHERE})

# What was found belongs to the folder that was given then.
if(NOT "${TENSORRT_ROOT}" STREQUAL "${EDGEPRUNE_TENSORRT_SEARCHED}")
  unset(EDGEPRUNE_TENSORRT_INCLUDE CACHE)
endif()
set(EDGEPRUNE_TENSORRT_SEARCHED "${TENSORRT_ROOT}" CACHE INTERNAL "TENSORRT_ROOT of the search for headers")
if(TENSORRT_ROOT)
  # Only there: headers of another version must not step in.
  find_path(EDGEPRUNE_TENSORRT_INCLUDE NvInferRuntime.h NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
    PATHS ${TENSORRT_ROOT} PATH_SUFFIXES include include/${CMAKE_SYSTEM_PROCESSOR}-linux-gnu)
  if(NOT EDGEPRUNE_TENSORRT_INCLUDE)
    message(FATAL_ERROR "edgeprune_tensorrt: TENSORRT_ROOT is ${TENSORRT_ROOT}, which has no include/NvInferRuntime.h: "
      "give the folder of a TensorRT that has it")
  endif()
else()
  find_path(EDGEPRUNE_TENSORRT_INCLUDE NvInferRuntime.h NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
    PATHS ${TENSORRT_FOLDERS})
endif()

if(NOT EDGEPRUNE_TENSORRT_INCLUDE)
  if(EDGEPRUNE_TENSORRT STREQUAL AUTO)
    message(STATUS "edgeprune_tensorrt: not built, TensorRT's headers (NvInferRuntime.h) were not found; ${TENSORRT_WHERE}")
    return()
  endif()
  message(FATAL_ERROR "edgeprune_tensorrt: TensorRT's headers (NvInferRuntime.h) were not found; ${TENSORRT_WHERE}")
endif()

file(STRINGS ${EDGEPRUNE_TENSORRT_INCLUDE}/NvInferVersion.h TENSORRT_VERSION_LINES
  REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? [0-9]+")
string(REGEX REPLACE ".*MAJOR[A-Z_]* ([0-9]+).*" "\\1" TENSORRT_MAJOR "${TENSORRT_VERSION_LINES}")
string(REGEX REPLACE ".*MINOR[A-Z_]* ([0-9]+).*" "\\1" TENSORRT_MINOR "${TENSORRT_VERSION_LINES}")
set(TENSORRT_FOUND_VERSION ${TENSORRT_MAJOR}.${TENSORRT_MINOR})
if(TENSORRT_FOUND_VERSION VERSION_LESS 10.0 OR NOT TENSORRT_MAJOR)
  message(FATAL_ERROR "edgeprune_tensorrt: the headers in ${EDGEPRUNE_TENSORRT_INCLUDE} are of TensorRT "
    "${TENSORRT_FOUND_VERSION}; plugins of version 3 need 10.0 or newer: give another with -DTENSORRT_ROOT=")
endif()
message(STATUS "edgeprune_tensorrt: TensorRT ${TENSORRT_FOUND_VERSION} in ${EDGEPRUNE_TENSORRT_INCLUDE}")

set(PLUGIN_SOURCES
  tensorrt/attention_score_plugin.cpp
  tensorrt/attributes.cpp
  tensorrt/operator_plugin.cpp
  tensorrt/plugin_library.cpp
  tensorrt/plugin_log.cpp
  tensorrt/score_select_plugin.cpp
  tensorrt/token_gather_plugin.cpp
  tensorrt/token_select_plugin.cpp)

# The plugins over the kernels, and over the references: their whole path but the launches runs without a GPU.
add_library(edgeprune_tensorrt SHARED ${PLUGIN_SOURCES} ${KERNEL_OBJECTS} ${KERNELS}/kv_compaction.cpp)
target_link_libraries(edgeprune_tensorrt PRIVATE ${EDGEPRUNE_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
add_dependencies(edgeprune_tensorrt edgeprune_kernels)  # or both would compile the same objects at the same time
add_library(edgeprune_tensorrt_reference SHARED EXCLUDE_FROM_ALL ${PLUGIN_SOURCES})
target_sources(edgeprune_tensorrt_reference PRIVATE ${REFERENCE_SOURCES})
foreach(library edgeprune_tensorrt edgeprune_tensorrt_reference)
  target_include_directories(${library} PRIVATE ${KERNELS} tensorrt)
  target_include_directories(${library} SYSTEM PRIVATE ${EDGEPRUNE_TENSORRT_INCLUDE} ${EDGEPRUNE_CUDART_INCLUDE})
  string(REPLACE ";" "," architectures "${EDGEPRUNE_CUDA_ARCHITECTURES}")
  target_compile_definitions(${library} PRIVATE EDGEPRUNE_PLUGIN_ARCHITECTURES="${architectures}")
  if(EDGEPRUNE_WARNINGS_ARE_ERRORS)  # not where users compile, with compilers that nobody tried
    target_compile_options(${library} PRIVATE -Werror)
  endif()
  # Its own kernels and no others of the process; a symbol of TensorRT would have to be linked and is refused.
  target_link_options(${library} PRIVATE -Wl,-Bsymbolic -Wl,-z,defs -Wl,--exclude-libs,ALL)
endforeach()

# TensorRT for RTX 1.7 asks the loader for libtensorrt_rtx.so when its parser meets a plugin, and ends the process where
# there is none. Its Python package has libtensorrt_rtx.so.1 alone. A library that is loaded under the name and needs the
# other answers it; the second target only stands for the real one while linking.
if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
  set(EMPTY ${CMAKE_CURRENT_BINARY_DIR}/empty.cpp)
  file(WRITE ${EMPTY} "")
  add_library(rtx_stand_in SHARED ${EMPTY})
  set_target_properties(rtx_stand_in PROPERTIES OUTPUT_NAME tensorrt_rtx VERSION 1 SOVERSION 1
    LIBRARY_OUTPUT_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/stand_in)
  add_library(edgeprune_rtx_name SHARED ${EMPTY})
  target_link_libraries(edgeprune_rtx_name PRIVATE rtx_stand_in)
  target_link_options(edgeprune_rtx_name PRIVATE -Wl,--no-as-needed -Wl,-soname,libtensorrt_rtx.so)
  set_target_properties(edgeprune_rtx_name PROPERTIES NO_SONAME ON SKIP_BUILD_RPATH ON)
endif()
