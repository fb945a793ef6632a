// TokenSelect, soft NMS: each choice needs the one before it, so the choices are made by one block per sequence. What
// they need of the features is prepared by the whole GPU beforehand: for every row, the rows near it and the factors
// by which it would lower them. AdaptPrune has at most 80 rows within its reach; a row with more neighbours than its
// list holds is computed at the time it is chosen, by the one block: slower, the same numbers.
#include <cfloat>
#include <type_traits>

#include "greedy_choice.cuh"
#include "token_select.h"

namespace edgeprune {
namespace {

constexpr int kNeighbours = 128;  // a list's length
constexpr int kListThreads = 256;

struct Neighbour {
  int row;
  float factor;
};

// Everything about one sequence that suppression depends on.
template <typename T>
struct Likeness {
  const T* features;
  const int64_t* places;
  const float* nearness;
  const uint8_t* droppable;
  int rows, width, table_size;
  float slope;  // -1 / 2σ²
  bool units;   // features can be read 16 bytes at a time

  __device__ Likeness of_sequence(int64_t b) const {
    Likeness one = *this;
    one.features += b * rows * width;
    one.places += b * rows * 2;
    one.droppable += b * rows;
    return one;
  }

  __device__ float near(int i, int j) const {
    const int64_t down = places[2 * j] - places[2 * i], right = places[2 * j + 1] - places[2 * i + 1];
    const int64_t squared = down * down + right * right;
    return nearness[squared < table_size ? squared : table_size - 1];
  }

  // What choosing row i does to the score of row j, by a whole warp. The order of additions is fixed, and the same for
  // all pairs: rows that are alike get the same factor.
  __device__ float factor(int i, int j, float near_ij) const {
    const T* a = features + static_cast<int64_t>(i) * width;
    const T* b = features + static_cast<int64_t>(j) * width;
    float ab = 0, aa = 0, bb = 0;
    if (units) {
      constexpr int kElements = Unit<T>::kElements;
#pragma unroll 1  // more would spill where one block of 1024 threads does it
      for (int f = lane_index() * kElements; f < width; f += 32 * kElements) {
        float x[kElements], y[kElements];
        Unit<T>::widen(*reinterpret_cast<const uint4*>(a + f), x);
        Unit<T>::widen(*reinterpret_cast<const uint4*>(b + f), y);
#pragma unroll
        for (int e = 0; e < kElements; ++e) add_products(x[e], y[e], ab, aa, bb);
      }
    } else {
      for (int f = lane_index(); f < width; f += 32) {
        add_products(static_cast<float>(a[f]), static_cast<float>(b[f]), ab, aa, bb);
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      ab += __shfl_xor_sync(kAllLanes, ab, step);
      aa += __shfl_xor_sync(kAllLanes, aa, step);
      bb += __shfl_xor_sync(kAllLanes, bb, step);
    }
    const float unlike = 1.0f - ab / (fmaxf(sqrtf(aa), 1e-12f) * fmaxf(sqrtf(bb), 1e-12f));
    return 1.0f - near_ij * expf(slope * (unlike * unlike));
  }

  static __device__ void add_products(float x, float y, float& xy, float& xx, float& yy) {
    xy = fmaf(x, y, xy);
    xx = fmaf(x, x, xx);
    yy = fmaf(y, y, yy);
  }
};

// One block per row. The order of a list is that of arrival and may differ from run to run: every entry concerns
// another row, so nothing depends on it.
template <typename T>
__global__ __launch_bounds__(kListThreads, 4) void list_neighbours(Likeness<T> all, int* num_neighbours,
                                                                Neighbour* neighbours) {
  EDGEPRUNE_SHARED(shared);
  int* found = reinterpret_cast<int*>(shared);
  int* rows = found + 1;
  const Likeness<T> likeness = all.of_sequence(blockIdx.y);
  const int i = blockIdx.x;
  const int64_t list = static_cast<int64_t>(blockIdx.y) * likeness.rows + i;
  if (!likeness.droppable[i]) return;  // it is never chosen
  if (threadIdx.x == 0) *found = 0;
  __syncthreads();
  for (int j = threadIdx.x; j < likeness.rows; j += kListThreads) {
    if (j == i || !likeness.droppable[j] || likeness.near(i, j) == 0.0f) continue;
    const int place = atomicAdd(found, 1);
    if (place < kNeighbours) rows[place] = j;
  }
  __syncthreads();
  if (threadIdx.x == 0) num_neighbours[list] = *found;
  if (*found > kNeighbours) return;
  for (int n = warp_index(); n < *found; n += kListThreads / 32) {
    const int j = rows[n];
    const float factor = likeness.factor(i, j, likeness.near(i, j));
    if (lane_index() == 0) neighbours[list * kNeighbours + n] = {j, factor};
  }
}

// Not to be had: text, or chosen. Every score is finite.
constexpr float kGone = -INFINITY;

__device__ inline float finite(float score) {
  return isnan(score) ? -FLT_MAX : fminf(fmaxf(score, -FLT_MAX), FLT_MAX);
}

template <typename T>
__global__ __launch_bounds__(kSelectThreads, 1) void choose_greedily(Likeness<T> all, const float* scores,
                                                                  const int64_t* num_keep,
                                                                  const int* num_neighbours,
                                                                  const Neighbour* neighbours,
                                                                  int64_t* keep_indices,
                                                                  int64_t* keep_count) {
  EDGEPRUNE_SHARED(shared);
  int* counts = reinterpret_cast<int*>(shared);
  float* score = reinterpret_cast<float*>(shared + kCountBytes);
  const Likeness<T> likeness = all.of_sequence(blockIdx.x);
  const int rows = likeness.rows;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * rows;
  int open = 0;
  for (int j = threadIdx.x; j < rows; j += kSelectThreads) {
    score[j] = likeness.droppable[j] ? finite(scores[first + j]) : kGone;
    open += likeness.droppable[j] ? 1 : 0;
  }
  open = block_sum(open, counts, 0);
  const int64_t asked = num_keep[blockIdx.x];
  const int num = static_cast<int>(asked < 0 ? 0 : asked < open ? asked : open);

  for (int n = 0; n < num; ++n) {
    __syncthreads();  // the scores are lowered, and the bests of the step before are read
    const int chosen =
        best_row_by(rows, reinterpret_cast<uint32_t*>(counts), [&](int j) { return score[j]; });
    const int listed = num_neighbours[first + chosen];
    // All have read the scores by now: best_row_by has a barrier behind its reads.
    if (threadIdx.x == 0) score[chosen] = kGone;
    if (listed <= kNeighbours) {
      if (static_cast<int>(threadIdx.x) < listed) {
        const Neighbour neighbour = neighbours[(first + chosen) * kNeighbours + threadIdx.x];
        const float old = score[neighbour.row];
        if (old != kGone) score[neighbour.row] = finite(old * neighbour.factor);
      }
    } else {
      for (int j = warp_index(); j < rows; j += kSelectWarps) {
        const float near = likeness.near(chosen, j), old = score[j];
        if (j == chosen || near == 0.0f || old == kGone) continue;
        const float factor = likeness.factor(chosen, j, near);
        if (lane_index() == 0) score[j] = finite(old * factor);
      }
    }
  }
  __syncthreads();
  write_chosen(rows, keep_indices + first, keep_count + blockIdx.x, counts,
               [&](int row) { return score[row] == kGone; });
}

size_t count_bytes(const SoftNmsProblem& p) {
  return align_256(sizeof(int) * static_cast<size_t>(p.batch) * static_cast<size_t>(p.rows));
}

template <typename T>
cudaError_t select_by_soft_nms(const SoftNmsProblem& p, const float* scores, const int64_t* num_keep,
                               const uint8_t* droppable, const T* features, const int64_t* places,
                               const float* nearness, int64_t* keep_indices, int64_t* keep_count,
                               void* workspace, cudaStream_t stream) {
  const bool units = reads_units(features, static_cast<int64_t>(p.features) * static_cast<int64_t>(sizeof(T)));
  const Likeness<T> likeness = {features, places, nearness, droppable, p.rows, p.features, p.table_size,
                                -0.5f / (p.similarity_sigma * p.similarity_sigma), units};
  int* num_neighbours = static_cast<int*>(workspace);
  auto* neighbours = reinterpret_cast<Neighbour*>(static_cast<char*>(workspace) + count_bytes(p));
  const cudaError_t error =
      launch(list_neighbours<T>, dim3(p.rows, p.batch), kListThreads, sizeof(int) * (1 + kNeighbours), stream,
             likeness, num_neighbours, neighbours);
  if (error != cudaSuccess) return error;
  const size_t shared_bytes = kCountBytes + sizeof(float) * static_cast<size_t>(p.rows);
  return launch(choose_greedily<T>, dim3(p.batch), kSelectThreads, shared_bytes, stream, likeness, scores, num_keep,
                num_neighbours, neighbours, keep_indices, keep_count);
}

}  // namespace
}  // namespace edgeprune

size_t edgeprune_select_by_soft_nms_workspace(const edgeprune::SoftNmsProblem* problem) {
  using namespace edgeprune;
  if (!is_valid(*problem)) return 0;
  const size_t lists = static_cast<size_t>(problem->batch) * static_cast<size_t>(problem->rows);
  return count_bytes(*problem) + align_256(sizeof(Neighbour) * kNeighbours * lists);
}

cudaError_t edgeprune_select_by_soft_nms(const edgeprune::SoftNmsProblem* problem, const float* scores,
                                         const int64_t* num_keep, const uint8_t* droppable,
                                         const void* features, const int64_t* places, const float* nearness,
                                         int64_t* keep_indices, int64_t* keep_count, void* workspace,
                                         cudaStream_t stream) {
  using namespace edgeprune;
  if (!is_valid(*problem) || problem->batch > kMaxGridYZ) return cudaErrorInvalidValue;
  const auto run = [&](auto element) {
    using T = decltype(element);
    return select_by_soft_nms(*problem, scores, num_keep, droppable, static_cast<const T*>(features), places,
                              nearness, keep_indices, keep_count, workspace, stream);
  };
  switch (problem->feature_type) {
    case ElementType::float32: return run(float{});
    case ElementType::float16: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}
