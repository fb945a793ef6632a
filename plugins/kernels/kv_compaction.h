// KV compaction: the rows of one layer's cache that stay (DyRate, at the tokens where the rate rises).
#pragma once

#include "kernel_types.h"

namespace edgeprune {

struct CacheLayer {
  int32_t batch;            // B
  int32_t key_heads;        // Hkv
  int64_t cached_rows;      // P
  int64_t capacity;         // rows that a head of the source has room for, at least P
  int64_t target_capacity;  // the same of the target, at least the rows kept
  int64_t row_bytes;        // D numbers
};

}  // namespace edgeprune

// Copies the rows keep_indices of keys and values, in this order, to the front of each head of the target.
//
// It is not done in place: blocks run in no order, so a row could be overwritten before it is read. The caches are
// two buffers that swap roles in any case.
//
// Shapes: keys, values: [B, Hkv, capacity, D]; kept_keys, kept_values: [B, Hkv, target_capacity, D];
//   keep_indices: [kept], 0 … P-1
// Returns cudaErrorInvalidValue for sizes that do not fit.
EDGEPRUNE_API cudaError_t edgeprune_compact_cache(const edgeprune::CacheLayer* layer, const void* keys,
                                                  const void* values, const int64_t* keep_indices,
                                                  int64_t kept, void* kept_keys, void* kept_values,
                                                  cudaStream_t stream);
