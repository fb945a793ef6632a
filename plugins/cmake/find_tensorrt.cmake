# Finds TensorRT's headers: EDGEPRUNE_TENSORRT_INCLUDE, empty where there are none, TENSORRT_MAJOR, TENSORRT_MINOR and
# TENSORRT_FOUND_VERSION. For the plugins and for the C++ runtime; TENSORRT_FOR names the one that asks, for messages, and
# TENSORRT_WHERE says where headers come from.
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
    message(FATAL_ERROR "${TENSORRT_FOR}: TENSORRT_ROOT is ${TENSORRT_ROOT}, which has no include/NvInferRuntime.h: "
      "give the folder of a TensorRT that has it")
  endif()
else()
  find_path(EDGEPRUNE_TENSORRT_INCLUDE NvInferRuntime.h NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH
    PATHS ${TENSORRT_FOLDERS})
endif()

if(EDGEPRUNE_TENSORRT_INCLUDE)
  file(STRINGS ${EDGEPRUNE_TENSORRT_INCLUDE}/NvInferVersion.h TENSORRT_VERSION_LINES
    REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? [0-9]+")
  string(REGEX REPLACE ".*MAJOR[A-Z_]* ([0-9]+).*" "\\1" TENSORRT_MAJOR "${TENSORRT_VERSION_LINES}")
  string(REGEX REPLACE ".*MINOR[A-Z_]* ([0-9]+).*" "\\1" TENSORRT_MINOR "${TENSORRT_VERSION_LINES}")
  set(TENSORRT_FOUND_VERSION ${TENSORRT_MAJOR}.${TENSORRT_MINOR})
endif()
