# libedgeprune_kernels: every .cu file compiled once for all architectures, checked for spills.
get_filename_component(CUDA_BIN ${EDGEPRUNE_NVCC} REALPATH)
get_filename_component(CUDA_BIN ${CUDA_BIN} DIRECTORY)
# A wrapper script may lie elsewhere: nvcc itself knows where its toolkit is.
execute_process(COMMAND ${EDGEPRUNE_NVCC} --dryrun -x cu -c /dev/null ERROR_VARIABLE DRY_RUN OUTPUT_QUIET)
if(DRY_RUN MATCHES "#\\$ _HERE_=([^\n]+)")
  set(CUDA_BIN ${CMAKE_MATCH_1})
endif()
get_filename_component(CUDA_ROOT ${CUDA_BIN} DIRECTORY)

set(CUDA_SEARCH HINTS ${CUDA_ROOT} ${CUDA_ROOT}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux
  /usr/local/cuda PATHS /usr)
find_path(EDGEPRUNE_CUDART_INCLUDE cuda_runtime_api.h ${CUDA_SEARCH} PATH_SUFFIXES include)
if(CMAKE_CROSSCOMPILING AND NOT EDGEPRUNE_CUDART)  # the one beside nvcc is for this machine
  message(FATAL_ERROR "edgeprune_kernels: give the ${CMAKE_SYSTEM_PROCESSOR} CUDA runtime with -DEDGEPRUNE_CUDART=, a "
    "libcudart_static.a of nvcc's version (it is in the ${CMAKE_SYSTEM_PROCESSOR} wheel of nvidia-cuda-runtime on PyPI)")
endif()
find_library(EDGEPRUNE_CUDART cudart_static ${CUDA_SEARCH} PATH_SUFFIXES lib lib64)
if(NOT EDGEPRUNE_CUDART OR NOT EDGEPRUNE_CUDART_INCLUDE)
  message(FATAL_ERROR "edgeprune_kernels: ${EDGEPRUNE_NVCC} was found, but not cuda_runtime_api.h and "
    "libcudart_static beside it. Install the toolkit's runtime (nvidia-cuda-runtime of the same version on PyPI), "
    "or give EDGEPRUNE_CUDART_INCLUDE and EDGEPRUNE_CUDART")
endif()

execute_process(COMMAND ${EDGEPRUNE_NVCC} --list-gpu-code OUTPUT_VARIABLE KNOWN OUTPUT_STRIP_TRAILING_WHITESPACE)
string(REPLACE "\n" ";" KNOWN "${KNOWN}")
foreach(architecture ${EDGEPRUNE_CUDA_ARCHITECTURES})
  if(NOT sm_${architecture} IN_LIST KNOWN)
    message(FATAL_ERROR "edgeprune_kernels: ${EDGEPRUNE_NVCC} cannot compile for sm_${architecture}, only for "
      "${KNOWN}. Choose others with -DEDGEPRUNE_CUDA_ARCHITECTURES=, for example 87 for Jetson Orin")
  endif()
endforeach()

file(GLOB KERNEL_HEADERS CONFIGURE_DEPENDS ${KERNELS}/*.h ${KERNELS}/*.cuh)
set(COMPILE_KERNEL ${CMAKE_CURRENT_SOURCE_DIR}/cmake/compile_kernel.cmake)
set(KERNEL_OBJECTS)
foreach(name attention_score attention_score_tiles attention_score_vectors token_gather token_select token_select_dpp
    token_select_soft_nms)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.o)
  add_custom_command(
    OUTPUT ${object} ${CMAKE_CURRENT_BINARY_DIR}/${name}.ptxas.txt
    COMMAND ${CMAKE_COMMAND} -DNVCC=${EDGEPRUNE_NVCC} -DSOURCE=${KERNELS}/${name}.cu -DOBJECT=${object}
      "-DARCHITECTURES=${EDGEPRUNE_CUDA_ARCHITECTURES}" -DHOST_COMPILER=${CMAKE_CXX_COMPILER}
      -P ${COMPILE_KERNEL}
    DEPENDS ${KERNELS}/${name}.cu ${KERNEL_HEADERS} ${COMPILE_KERNEL}
    COMMENT "Compiling ${name}.cu for sm_${EDGEPRUNE_CUDA_ARCHITECTURES}"
    VERBATIM)
  list(APPEND KERNEL_OBJECTS ${object})
endforeach()

find_package(Threads REQUIRED)
add_library(edgeprune_kernels SHARED ${KERNEL_OBJECTS} ${KERNELS}/kv_compaction.cpp)
target_include_directories(edgeprune_kernels SYSTEM PRIVATE ${EDGEPRUNE_CUDART_INCLUDE})
# The runtime is linked in: the library then needs the driver alone and loads beside any other CUDA version.
target_link_libraries(edgeprune_kernels PRIVATE ${EDGEPRUNE_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
target_link_options(edgeprune_kernels PRIVATE -Wl,--exclude-libs,ALL)
