# Toolchain file: from x86-64 for Jetson and other aarch64 Linux machines (Debian's g++-aarch64-linux-gnu).
#
#   cmake -S plugins -B out/plugins-aarch64 --toolchain plugins/cmake/aarch64.cmake
#     -DEDGEPRUNE_CUDA_ARCHITECTURES=87 -DTENSORRT_ROOT= -DEDGEPRUNE_CUDART= (libcudart_static.a for aarch64)
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
