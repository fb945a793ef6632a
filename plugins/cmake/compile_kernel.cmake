# Compiles one .cu file for all architectures and fails if a kernel spills registers: a spill costs bandwidth in the
# inner loops and goes unnoticed otherwise. Beside the object lies ptxas' report.
#
#   cmake -DNVCC= -DSOURCE= -DOBJECT= -DARCHITECTURES= -DHOST_COMPILER= -P compile_kernel.cmake
set(code)
foreach(architecture ${ARCHITECTURES})
  list(APPEND code -gencode arch=compute_${architecture},code=sm_${architecture})
endforeach()
execute_process(
  COMMAND ${NVCC} -c ${SOURCE} -o ${OBJECT} -std=c++17 -O3 -ccbin ${HOST_COMPILER} -Xcompiler
    -fPIC,-fvisibility=hidden,-Wall,-Wextra -Xptxas -v ${code}
  RESULT_VARIABLE failed OUTPUT_VARIABLE report ERROR_VARIABLE report)
if(failed)
  message(FATAL_ERROR "${report}")
endif()
string(REGEX REPLACE "\\.o$" ".ptxas.txt" report_file ${OBJECT})
file(WRITE ${report_file} "${report}")
string(REGEX MATCHALL "[^\n]*Compiling entry[^\n]*\n[^\n]*\n[^\n]*spill stores[^\n]*" kernels "${report}")
list(LENGTH kernels count)
if(count EQUAL 0)
  file(REMOVE ${OBJECT})
  message(FATAL_ERROR "${SOURCE}: nvcc reported no kernel, so spills cannot be checked:\n${report}")
endif()
foreach(kernel ${kernels})
  if(NOT kernel MATCHES " 0 bytes spill stores, 0 bytes spill loads")
    file(REMOVE ${OBJECT})
    message(FATAL_ERROR "${SOURCE}: a kernel spills registers; use fewer values at a time:\n${kernel}")
  endif()
endforeach()
