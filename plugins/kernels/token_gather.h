// TokenGather: the kept rows of several tensors, in one launch.
#pragma once

#include "kernel_types.h"

namespace edgeprune {

constexpr int32_t kMaxGathered = 8;

// A tensor as `outer` blocks of rows: for [1, Hkv, P, D] along axis 2, outer = Hkv, rows = P and row_bytes = D numbers.
// The strides let a block be a part of a larger buffer, as in a KV cache with room for more rows.
struct GatheredTensor {
  const void* source;
  void* target;
  int64_t outer;
  int64_t rows;
  int64_t row_bytes;
  int64_t source_stride;  // bytes from one block to the next, at least rows · row_bytes
  int64_t target_stride;  // the same, at least kept · row_bytes
};

inline bool is_valid(const GatheredTensor* tensors, int32_t count, int64_t kept) {
  if (count < 1 || count > kMaxGathered || kept < 0) return false;
  for (int32_t i = 0; i < count; ++i) {
    const GatheredTensor& t = tensors[i];
    if (t.outer < 0 || t.rows < 0 || t.row_bytes < 0) return false;
    if (t.source_stride < t.rows * t.row_bytes || t.target_stride < kept * t.row_bytes) return false;
  }
  return true;
}

}  // namespace edgeprune

// target[o, i] = source[o, keep_indices[i]] for every tensor, block o and i < kept. Source and target must not
// overlap. An index outside of 0 … rows-1 gives a row of zeros, so that no memory outside is read.
//
// Shapes: tensors: [count] on the host, 1 to 8; keep_indices: [kept]
// Returns cudaErrorInvalidValue for sizes that do not fit, and for a tensor with 2³¹ or more accesses.
EDGEPRUNE_API cudaError_t edgeprune_token_gather(const edgeprune::GatheredTensor* tensors, int32_t count,
                                                 const int64_t* keep_indices, int64_t kept,
                                                 cudaStream_t stream);
