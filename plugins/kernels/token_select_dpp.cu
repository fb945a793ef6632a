// TokenSelect, greedy choice of a determinantal point process: one block per sequence, because each choice needs the one
// before it. The Cholesky factor grows by a row per choice; it lies in the workspace, row t holding what the t-th kept
// row of each group explains of the rows of that group, so threads read it side by side.
#include <cfloat>

#include "greedy_choice.cuh"
#include "token_select.h"

namespace edgeprune {
namespace {

// In place of gains, which are never negative: a row that is kept, and one whose group keeps no more.
constexpr float kKept = -2.0f;
constexpr float kClosed = -1.0f;

__device__ inline float finite_or_zero(float value) { return fabsf(value) <= FLT_MAX ? value : 0.0f; }

// One sequence of the batch.
struct DppSequence {
  const float* kernel;
  const int64_t* groups;
  const int64_t* group_keep;
  float* factor;
  int* taken;  // rows of this row's group that are kept
  int rows;
};

// What choosing row `chosen` does to row j of its group; t is the row's place among those of its group.
__device__ inline float less_explained(const DppSequence& s, int chosen, int j, int t, float scale, float gain) {
  float entry = 0.0f;
  if (scale > 0.0f) {
    const float* own = s.factor + chosen;
    const float* other = s.factor + j;
    float shared = 0.0f;
    for (int u = 0; u < t; ++u) {
      shared = fmaf(own[static_cast<int64_t>(u) * s.rows], other[static_cast<int64_t>(u) * s.rows], shared);
    }
    entry = (finite_or_zero(s.kernel[static_cast<int64_t>(chosen) * s.rows + j]) - shared) * scale;
  }
  s.factor[static_cast<int64_t>(t) * s.rows + j] = entry;
  return fmaxf(gain - entry * entry, 0.0f);
}

__global__ __launch_bounds__(kSelectThreads, 1) void choose_by_dpp(int rows, const float* kernel,
                                                                const int64_t* num_keep, const uint8_t* droppable,
                                                                const int64_t* groups, const int64_t* group_keep,
                                                                float* factor, int* taken, int64_t* keep_indices,
                                                                int64_t* keep_count) {
  EDGEPRUNE_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  float* gain = reinterpret_cast<float*>(shared + kCountBytes);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  const DppSequence s = {kernel + first * rows, groups + first, group_keep + first, factor + first * rows,
                         taken + first, rows};
  for (int j = threadIdx.x; j < rows; j += kSelectThreads) {
    const float own = finite_or_zero(s.kernel[static_cast<int64_t>(j) * rows + j]);
    gain[j] = !droppable[first + j] ? kKept : s.group_keep[j] > 0 ? fmaxf(own, 0.0f) : kClosed;
    s.taken[j] = 0;
  }
  const int64_t asked = num_keep[blockIdx.x];
  const int num = static_cast<int>(asked < 0 ? 0 : asked < rows ? asked : rows);

  for (int n = 0; n < num; ++n) {
    __syncthreads();  // the gains are lowered, and the bests of the step before are read
    const int chosen = best_row_by(rows, reinterpret_cast<uint32_t*>(counts), [&](int j) {
      return gain[j] < 0.0f ? -INFINITY : rintf(gain[j] * kDppSteps);
    });
    const float own_gain = gain[chosen];
    if (own_gain < 0.0f) break;  // the same in all threads: nothing is left
    const int64_t group = s.groups[chosen];
    const int t = s.taken[chosen];
    const float scale = rintf(own_gain * kDppSteps) > 0.0f ? 1.0f / sqrtf(own_gain + kDppEpsilon) : 0.0f;
    const bool full = t + 1 >= s.group_keep[chosen];
    __syncthreads();  // all have read what is changed now
    for (int j = threadIdx.x; j < rows; j += kSelectThreads) {
      if (s.groups[j] != group) continue;
      s.taken[j] = t + 1;
      const float old = gain[j];
      if (j == chosen) {
        gain[j] = kKept;
      } else if (old >= 0.0f) {
        gain[j] = full ? kClosed : less_explained(s, chosen, j, t, scale, old);
      }
    }
  }
  __syncthreads();
  write_chosen(rows, keep_indices + first, keep_count + blockIdx.x, counts,
               [&](int row) { return gain[row] == kKept; });
}

size_t factor_bytes(int32_t batch, int32_t rows) {
  return align_256(sizeof(float) * static_cast<size_t>(batch) * static_cast<size_t>(rows) * static_cast<size_t>(rows));
}

}  // namespace
}  // namespace edgeprune

size_t edgeprune_select_by_dpp_workspace(int32_t batch, int32_t rows) {
  using namespace edgeprune;
  if (!is_selection(batch, rows)) return 0;
  return factor_bytes(batch, rows) + align_256(sizeof(int) * static_cast<size_t>(batch) * static_cast<size_t>(rows));
}

cudaError_t edgeprune_select_by_dpp(int32_t batch, int32_t rows, const float* kernel, const int64_t* num_keep,
                                    const uint8_t* droppable, const int64_t* groups, const int64_t* group_keep,
                                    int64_t* keep_indices, int64_t* keep_count, void* workspace,
                                    cudaStream_t stream) {
  using namespace edgeprune;
  if (!is_selection(batch, rows)) return cudaErrorInvalidValue;
  auto* factor = static_cast<float*>(workspace);
  auto* taken = reinterpret_cast<int*>(static_cast<char*>(workspace) + factor_bytes(batch, rows));
  const size_t shared_bytes = kCountBytes + sizeof(float) * static_cast<size_t>(rows);
  return launch(choose_by_dpp, dim3(batch), kSelectThreads, shared_bytes, stream, rows, kernel, num_keep, droppable,
                groups, group_keep, factor, taken, keep_indices, keep_count);
}
