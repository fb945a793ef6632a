// Rows of a sequence in one block of 1024 threads, and the permutation that moves the kept ones to the front.
//
// Each warp owns a run of 32·Items rows, in Items slices of 32: slices are read and written side by side, and the
// order of rows within a warp is that of slices and lanes, so ranks are ballots and population counts.
#pragma once

#include "device.cuh"

namespace edgeprune {

constexpr int kSelectThreads = 1024;
constexpr int kSelectWarps = kSelectThreads / 32;
// Shared memory of the functions below: one number per warp, twice, so that a count need not wait for the reader of
// the count before.
constexpr int kCountBytes = 2 * kSelectWarps * static_cast<int>(sizeof(int));

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / 32; }

template <int Items>
__device__ inline int row_of(int item) {
  return warp_index() * 32 * Items + item * 32 + lane_index();
}

// A number that orders as the score does: NaN lowest, -0 as +0. It is never 0, which means "no candidate".
__device__ inline uint32_t order_key(float score) {
  if (isnan(score)) return 1;
  const uint32_t bits = __float_as_uint(score + 0.0f);  // -0 + 0 is +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Sums over the block, one barrier each. `parity` must alternate between calls.
__device__ inline int block_sum(int value, int* counts, int parity) {
  int* sums = counts + parity * kSelectWarps;
  const int sum = __reduce_add_sync(kAllLanes, value);
  if (lane_index() == 0) sums[warp_index()] = sum;
  __syncthreads();
  return __reduce_add_sync(kAllLanes, sums[lane_index()]);
}

// Calls visit(i, rank, total) for every slice i: how many flags are set in rows before this thread's row, and in all.
// Bit i of `flags` belongs to slice i. The ballots are taken twice, because keeping them costs a register per slice.
template <int Items, typename Visit>
__device__ void visit_ranks(uint32_t flags, int* counts, Visit visit) {
  const unsigned before = (1u << lane_index()) - 1;
  int sum = 0;
#pragma unroll 4
  for (int i = 0; i < Items; ++i) sum += __popc(__ballot_sync(kAllLanes, flags >> i & 1));
  __syncthreads();  // whoever used `counts` before is done
  if (lane_index() == 0) counts[warp_index()] = sum;
  __syncthreads();
  // Every warp sums up all warps before it: no second round through shared memory.
  int until = counts[lane_index()];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, until, step);
    if (lane_index() >= step) until += other;
  }
  const int total = __shfl_sync(kAllLanes, until, 31);
  int rank = __shfl_sync(kAllLanes, until, warp_index()) - sum;
  __syncthreads();
#pragma unroll 4
  for (int i = 0; i < Items; ++i) {
    const unsigned votes = __ballot_sync(kAllLanes, flags >> i & 1);
    visit(i, rank + __popc(votes & before), total);
    rank += __popc(votes);
  }
}

// keep_indices: the kept rows, ascending, then the others, ascending. No bit of `keep` is set behind the end.
template <int Items>
__device__ void write_partition(uint32_t keep, int rows, int64_t* keep_indices, int64_t* keep_count,
                                int* counts) {
  visit_ranks<Items>(keep, counts, [&](int i, int rank, int kept) {
    const int row = row_of<Items>(i);
    if (row < rows) keep_indices[keep >> i & 1 ? rank : kept + row - rank] = row;
    if (i == 0 && threadIdx.x == 0) *keep_count = kept;
  });
}

// Calls `launch_items` with the least number of slices that holds the rows: 1, 4 or 16.
template <typename LaunchItems>
cudaError_t with_items(int32_t rows, LaunchItems launch_items) {
  if (rows <= kSelectThreads) return launch_items(std::integral_constant<int, 1>());
  if (rows <= 4 * kSelectThreads) return launch_items(std::integral_constant<int, 4>());
  return launch_items(std::integral_constant<int, 16>());
}

}  // namespace edgeprune
