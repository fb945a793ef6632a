# Adds the TensorRT backend to SOURCES where TensorRT's headers are, else what says that it is missing.
if(EDGEPRUNE_TENSORRT)
  set(TENSORRT_FOR edgeprune_cpp)
  include(${CMAKE_CURRENT_SOURCE_DIR}/../../plugins/cmake/find_tensorrt.cmake)
  if(EDGEPRUNE_TENSORRT_INCLUDE AND (TENSORRT_FOUND_VERSION VERSION_LESS 10.3 OR NOT TENSORRT_MAJOR))
    message(FATAL_ERROR "edgeprune_cpp: the headers in ${EDGEPRUNE_TENSORRT_INCLUDE} are of TensorRT "
      "${TENSORRT_FOUND_VERSION}; the backend needs 10.3 or newer: give another with -DTENSORRT_ROOT=, or pass "
      "-DEDGEPRUNE_TENSORRT=OFF")
  elseif(NOT EDGEPRUNE_TENSORRT_INCLUDE AND NOT EDGEPRUNE_TENSORRT STREQUAL AUTO)
    message(FATAL_ERROR "edgeprune_cpp: TensorRT's headers (NvInferRuntime.h) were not found; ${TENSORRT_WHERE}")
  endif()
else()
  set(EDGEPRUNE_TENSORRT_INCLUDE "")
endif()

if(EDGEPRUNE_TENSORRT_INCLUDE)
  message(STATUS "edgeprune_cpp: TensorRT backend with the headers of ${TENSORRT_FOUND_VERSION} in ${EDGEPRUNE_TENSORRT_INCLUDE}")
  # A target of their own, so that other headers compile nothing else anew.
  add_library(tensorrt_backend OBJECT
    src/tensorrt/engine_graph.cpp
    src/tensorrt/plugin_library.cpp
    src/tensorrt/tensorrt_backend.cpp
    src/tensorrt/tensorrt_library.cpp)
  target_include_directories(tensorrt_backend PRIVATE ${CMAKE_CURRENT_SOURCE_DIR}/src)
  # What TensorRT's headers need of CUDA's.
  set(TENSORRT_CUDA_TYPES ${CMAKE_CURRENT_SOURCE_DIR}/src/tensorrt/cuda_types)
  target_include_directories(tensorrt_backend SYSTEM PRIVATE
    ${EDGEPRUNE_INCLUDES} ${EDGEPRUNE_TENSORRT_INCLUDE} ${TENSORRT_CUDA_TYPES})
  if(EDGEPRUNE_TESTS)  # not where users compile, with headers that nobody tried
    target_compile_options(tensorrt_backend PRIVATE -Werror)
  endif()
  list(APPEND SOURCES $<TARGET_OBJECTS:tensorrt_backend>)
else()
  message(STATUS "edgeprune_cpp: without the TensorRT backend, its headers (NvInferRuntime.h) were not found or it is off")
  list(APPEND SOURCES src/tensorrt/without_tensorrt.cpp)
endif()
