// TokenSelect, top-k and threshold: one block per sequence, everything in registers.
//
// The k-th highest score is found bit by bit: 32 counts of "how many keys are at least this". That is a fixed number of
// steps for any input. A histogram of digits takes fewer, but attention scores share their leading digits, so its
// shared-memory counters would be fought over.
#include <type_traits>

#include "block_partition.cuh"
#include "token_select.h"

namespace edgeprune {
namespace {

// The rows of a thread as bits, one per slice: those that there are, and those that are droppable.
template <int Items>
__device__ uint32_t rows_inside(int rows) {
  uint32_t inside = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) inside |= (row_of<Items>(i) < rows ? 1u : 0u) << i;
  return inside;
}

template <int Items>
__device__ uint32_t droppable_rows(int rows, const uint8_t* droppable) {
  uint32_t open = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    const int row = row_of<Items>(i);
    if (row < rows && droppable[row]) open |= 1u << i;
  }
  return open;
}

template <int Items>
__device__ void read_keys(uint32_t (&key)[Items], uint32_t open, const float* scores) {
#pragma unroll
  for (int i = 0; i < Items; ++i) key[i] = open >> i & 1 ? order_key(scores[row_of<Items>(i)]) : 0;
}

template <int Items>
__device__ int count_at_least(const uint32_t (&key)[Items], uint32_t least, int* counts, int& parity) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) count += key[i] >= least;
  parity ^= 1;
  return block_sum(count, counts, parity);
}

template <int Items>
__global__ __launch_bounds__(kSelectThreads, 1) void select_top_k(int rows, const float* scores,
                                                               const int64_t* num_keep,
                                                               const uint8_t* droppable,
                                                               int64_t* keep_indices, int64_t* keep_count) {
  EDGEPRUNE_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  const uint32_t open = droppable_rows<Items>(rows, droppable + first);
  uint32_t keep = rows_inside<Items>(rows) & ~open;
  uint32_t key[Items];
  read_keys(key, open, scores + first);
  int parity = 0;
  const int candidates = count_at_least(key, 1u, counts, parity);
  const int64_t asked = num_keep[blockIdx.x];
  const int num = static_cast<int>(asked < 0 ? 0 : asked < candidates ? asked : candidates);

  if (num > 0) {  // the same in all threads, as is everything that branches below
    uint32_t last = 0;  // the greatest number that at least `num` keys reach: the key of the last row kept
#pragma unroll 1  // unrolled, it would spill
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t least = last | 1u << bit;
      const int count = count_at_least(key, least, counts, parity);
      if (count >= num) last = least;
      if (count == num) break;
    }
    // Of the rows equal to it, the first in order fill what those above leave. After an early end exactly `num` keys
    // reach `last`, so all that are equal fit. No key is the greatest number, which would be a NaN.
    const int above = count_at_least(key, last + 1, counts, parity);
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if (key[i] > last) keep |= 1u << i;
      if (key[i] == last) equal |= 1u << i;
    }
    visit_ranks<Items>(equal, counts, [&](int i, int rank, int) {
      if (rank < num - above) keep |= equal & 1u << i;
    });
  }
  write_partition<Items>(keep, rows, keep_indices + first, keep_count + blockIdx.x, counts);
}

// The row with the highest key, the lowest index among equals; -1 without a candidate.
template <int Items>
__device__ int best_row(const uint32_t (&key)[Items], int* counts) {
  unsigned long long best = 0;
#pragma unroll
  for (int i = 0; i < Items; ++i) {
    // The index is inverted, so that the greater of two numbers is the lower index.
    const unsigned long long both = static_cast<unsigned long long>(key[i]) << 32 |
                                    (0xffffffffu - static_cast<unsigned>(row_of<Items>(i)));
    if (key[i] != 0 && both > best) best = both;
  }
  auto* bests = reinterpret_cast<unsigned long long*>(counts);
  __syncthreads();
#pragma unroll
  for (int round = 0; round < 2; ++round) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const unsigned long long other = __shfl_xor_sync(kAllLanes, best, step);
      if (other > best) best = other;
    }
    if (round == 0) {
      if (lane_index() == 0) bests[warp_index()] = best;
      __syncthreads();
      best = bests[lane_index()];
    }
  }
  __syncthreads();
  return best == 0 ? -1 : static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

template <int Items>
__global__ __launch_bounds__(kSelectThreads, 1) void select_by_threshold(int pairs, int rows,
                                                                      const float* scores,
                                                                      const float* thresholds,
                                                                      const uint8_t* droppable,
                                                                      int64_t* keep_indices,
                                                                      int64_t* keep_count) {
  EDGEPRUNE_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  const int64_t first_score = first * pairs;
  const uint32_t open = droppable_rows<Items>(rows, droppable + first);
  uint32_t above = 0;
#pragma unroll 1
  for (int p = 0; p < pairs; ++p) {
    const int64_t first_of_pair = first_score + static_cast<int64_t>(p) * rows;
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      const int64_t at = first_of_pair + row_of<Items>(i);
      if (open >> i & 1 && scores[at] > thresholds[at]) above |= 1u << i;
    }
  }
  if (!__syncthreads_or(above != 0)) {
    uint32_t key[Items];
    read_keys(key, open, scores + first_score);
    const int survivor = best_row(key, counts);
#pragma unroll
    for (int i = 0; i < Items; ++i) {
      if (row_of<Items>(i) == survivor) above |= 1u << i;
    }
  }
  const uint32_t keep = above | (rows_inside<Items>(rows) & ~open);
  write_partition<Items>(keep, rows, keep_indices + first, keep_count + blockIdx.x, counts);
}

// As large as two numbers per warp, of 4 bytes each: also one of 8.
static_assert(kCountBytes >= kSelectWarps * static_cast<int>(sizeof(unsigned long long)));

}  // namespace
}  // namespace edgeprune

cudaError_t edgeprune_select_top_k(int32_t batch, int32_t rows, const float* scores, const int64_t* num_keep,
                                   const uint8_t* droppable, int64_t* keep_indices, int64_t* keep_count,
                                   cudaStream_t stream) {
  using namespace edgeprune;
  if (!is_selection(batch, rows)) return cudaErrorInvalidValue;
  return with_items(rows, [&](auto items) {
    return launch(select_top_k<items()>, dim3(batch), kSelectThreads, kCountBytes, stream, rows, scores,
                  num_keep, droppable, keep_indices, keep_count);
  });
}

cudaError_t edgeprune_select_by_threshold(int32_t batch, int32_t pairs, int32_t rows, const float* scores,
                                          const float* thresholds, const uint8_t* droppable,
                                          int64_t* keep_indices, int64_t* keep_count, cudaStream_t stream) {
  using namespace edgeprune;
  if (!is_selection(batch, rows) || pairs < 1) return cudaErrorInvalidValue;
  return with_items(rows, [&](auto items) {
    return launch(select_by_threshold<items()>, dim3(batch), kSelectThreads, kCountBytes, stream, pairs, rows,
                  scores, thresholds, droppable, keep_indices, keep_count);
  });
}
