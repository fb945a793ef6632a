// TokenGather on the host.
#include <cstring>

#include "token_gather.h"

cudaError_t edgeprune_token_gather(const edgeprune::GatheredTensor* tensors, int32_t count,
                                   const int64_t* keep_indices, int64_t kept, cudaStream_t) {
  if (!edgeprune::is_valid(tensors, count, kept)) return cudaErrorInvalidValue;
  for (int32_t n = 0; n < count; ++n) {
    const edgeprune::GatheredTensor& t = tensors[n];
    for (int64_t o = 0; o < t.outer; ++o) {
      const char* source = static_cast<const char*>(t.source) + o * t.source_stride;
      char* target = static_cast<char*>(t.target) + o * t.target_stride;
      for (int64_t i = 0; i < kept; ++i, target += t.row_bytes) {
        const int64_t row = keep_indices[i];
        if (row >= 0 && row < t.rows) {
          std::memcpy(target, source + row * t.row_bytes, static_cast<size_t>(t.row_bytes));
        } else {
          std::memset(target, 0, static_cast<size_t>(t.row_bytes));
        }
      }
    }
  }
  return cudaSuccess;
}
