# libedgeprune_tensorrt: the plugins of the operators with the kernels in one file. Included where the kernels are built.
#
# Of TensorRT only headers are needed: nothing of it is linked, so one library serves every TensorRT, and TensorRT for
# RTX, whose major version is that of the headers.
option(EDGEPRUNE_WARNINGS_ARE_ERRORS "Refuse warnings in the plugins' sources" OFF)
set(TENSORRT_FOR edgeprune_tensorrt)
include(${CMAKE_CURRENT_LIST_DIR}/find_tensorrt.cmake)

if(NOT EDGEPRUNE_TENSORRT_INCLUDE)
  if(EDGEPRUNE_TENSORRT STREQUAL AUTO)
    message(STATUS "edgeprune_tensorrt: not built, TensorRT's headers (NvInferRuntime.h) were not found; ${TENSORRT_WHERE}")
    return()
  endif()
  message(FATAL_ERROR "edgeprune_tensorrt: TensorRT's headers (NvInferRuntime.h) were not found; ${TENSORRT_WHERE}")
endif()

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
