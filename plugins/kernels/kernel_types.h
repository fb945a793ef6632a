// What the signatures of all kernels share. No TensorRT and no torch: pointers, sizes and a stream.
//
// Each operator has two implementations of the same functions: `<operator>.cu` for the GPU, in
// libedgeprune_kernels, and `<operator>_reference.cpp` for the host, in libedgeprune_reference, which takes host
// pointers and ignores the stream. Nothing is allocated and the host never waits; what a function needs beyond
// its outputs is the workspace, whose size its `_workspace` function gives. All tensors are dense and row-major.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if __has_include(<cuda_runtime_api.h>)
#include <cuda_runtime_api.h>
#else
// The references are built where there is no CUDA toolkit. These names are all that the signatures take from it.
typedef struct CUstream_st* cudaStream_t;
enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
typedef enum cudaError cudaError_t;
#endif

#define EDGEPRUNE_API extern "C" __attribute__((visibility("default")))

namespace edgeprune {

enum class ElementType : int32_t { float32 = 0, float16 = 1, bfloat16 = 2 };

inline bool is_element_type(ElementType type) {
  return type == ElementType::float32 || type == ElementType::float16 || type == ElementType::bfloat16;
}

inline int32_t element_bytes(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

}  // namespace edgeprune
