// Choosing rows one after the other in one block of 1024 threads: the best of what is left, over and over.
#pragma once

#include "block_partition.cuh"
#include "token_select.h"

namespace edgeprune {

// The row with the highest value_of(row), the lowest index among equals; some row where none has a value above minus
// infinity. `bests` holds a number per warp, twice; there is a barrier behind the last value_of.
template <typename ValueOf>
__device__ inline int best_row_by(int rows, uint32_t* bests, ValueOf value_of) {
  uint32_t best = 0;
  int row = 0;
  for (int j = threadIdx.x; j < rows; j += kSelectThreads) {
    const uint32_t key = order_key(value_of(j));
    if (key > best) {
      best = key;
      row = j;
    }
  }
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    const uint32_t highest = __reduce_max_sync(kAllLanes, best);
    row = static_cast<int>(
        __reduce_min_sync(kAllLanes, best == highest ? static_cast<unsigned>(row) : 0xffffffffu));
    best = highest;
    if (round == 0) {
      if (lane_index() == 0) {
        bests[warp_index()] = best;
        bests[kSelectWarps + warp_index()] = static_cast<uint32_t>(row);
      }
      __syncthreads();
      best = bests[lane_index()];
      row = static_cast<int>(bests[kSelectWarps + lane_index()]);
    }
  }
  return row;
}

// Partitions the rows by a flag in shared memory; every thread must be behind a barrier after the last change.
template <typename IsKept>
__device__ inline void write_chosen(int rows, int64_t* keep_indices, int64_t* keep_count, int* counts, IsKept is_kept) {
  constexpr int Items = kMaxSelectRows / kSelectThreads;
  uint32_t keep = 0;  // one bit per slice
  for (int i = 0; i < Items; ++i) {
    const int row = row_of<Items>(i);
    if (row < rows && is_kept(row)) keep |= 1u << i;
  }
  write_partition<Items>(keep, rows, keep_indices, keep_count, counts);
}

}  // namespace edgeprune
