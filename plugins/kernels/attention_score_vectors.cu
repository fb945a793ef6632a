// AttentionScore where keys are multiplied with a few vectors per head: bound by reading the keys, which is done once.
//
// Few rows: the vectors are query rows. Their logits, B·H·R·S numbers, are written down with the maximum and the sum
// of each run of 64 keys; a second kernel merges those, and averages the probabilities over heads.
// Logits of any number of rows: the weighted sum over rows commutes with the product, so rows are summed up first and
// the keys are multiplied with one vector per weighting.
#include "attention_rows.cuh"

namespace edgeprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxVectors = 8;  // that one block multiplies its keys with
static_assert(kFewRows <= kMaxVectors);

__device__ inline int lane_of(int lanes) { return static_cast<int>(threadIdx.x) & (lanes - 1); }

// Weighted sums of query rows: vectors[head, split, g, d] = Σ over a share of the rows of row_weight · q.
template <typename T>
__global__ __launch_bounds__(kThreads, 4) void sum_rows(const __grid_constant__ AttentionArguments a, int columns) {
  EDGEPRUNE_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);
  const int64_t head = blockIdx.y;
  const int split = blockIdx.x, g = blockIdx.z, D = a.problem.head_dim, M = a.plan.head_rows;
  const int column = lane_of(columns), lane = static_cast<int>(threadIdx.x) / columns, lanes = kThreads / columns;
  const QueryRows<T> rows(a, head);
  const int per_split = static_cast<int>(ceil_div(M, a.plan.row_splits));
  const int end = min((split + 1) * per_split, M);
  float sum = 0;
  if (column < D) {
#pragma unroll 4
    for (int m = split * per_split + lane; m < end; m += lanes) {
      sum = fmaf(rows.weight(g, m, head / a.problem.key_heads), static_cast<float>(rows(m)[column]), sum);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || column >= D) return;
  for (int other = 1; other < lanes; ++other) sum += sums[other * columns + column];
  a.vectors[((head * a.plan.row_splits + split) * a.problem.groups + g) * D + column] = sum;
}

// Keys as multiply_keys reads them.
struct KeyRow {
  int units;    // 16-byte units of a key; 0: numbers are read one by one
  int lanes;    // threads that share a key, a power of two
  int vectors;  // rows or weightings, in all
  int pitch;    // numbers from vector to vector in shared memory
};

// The products of 64 keys with up to `Vectors` vectors of their head.
template <typename T, int Vectors>
__global__ __launch_bounds__(kThreads, Vectors == 1 ? 4 : 1) void multiply_keys(const __grid_constant__ AttentionArguments a,
                                                          const __grid_constant__ KeyRow shape) {
  EDGEPRUNE_SHARED(shared);
  float* vectors = reinterpret_cast<float*>(shared);
  float* logits = vectors + Vectors * shape.pitch;  // [Vectors][kKeysPerBlock]
  const bool few_rows = a.plan.path == AttentionPath::few_rows;
  const int64_t head = blockIdx.y;
  const int D = a.problem.head_dim, S = a.problem.keys, G = a.problem.groups, M = a.plan.head_rows;
  const int first_key = static_cast<int>(blockIdx.x) * kKeysPerBlock;
  const int first_vector = static_cast<int>(blockIdx.z) * Vectors;
  const QueryRows<T> rows(a, head);
  for (int i = threadIdx.x; i < Vectors * shape.pitch; i += kThreads) {
    const int v = first_vector + i / shape.pitch, d = i % shape.pitch;
    float value = 0;
    if (v < shape.vectors && d < D) {
      if (few_rows) {
        value = static_cast<float>(rows(v)[d]);
      } else {
        for (int s = 0; s < a.plan.row_splits; ++s) {
          value += a.vectors[((head * a.plan.row_splits + s) * G + v) * D + d];
        }
      }
    }
    vectors[i] = value;
  }
  __syncthreads();

  const T* keys = static_cast<const T*>(a.key) + head * S * D;
  const int lane = lane_of(shape.lanes), per_round = kThreads / shape.lanes;
  // One vector leaves registers for four keys under way at a time; eight do not.
  [[maybe_unused]] constexpr int kUnrolled = Vectors == 1 ? 4 : 1;
  // All threads go through all rounds, because the sums over lanes need whole warps.
#pragma unroll kUnrolled
  for (int k = static_cast<int>(threadIdx.x) / shape.lanes; k < kKeysPerBlock + per_round - 1; k += per_round) {
    if (k - k % per_round >= kKeysPerBlock) break;
    const int j = first_key + k;
    const bool valid = k < kKeysPerBlock && j < S;
    const T* key = keys + static_cast<int64_t>(valid ? j : 0) * D;
    float dot[Vectors] = {};
    if (shape.units > 0) {
      constexpr int kElements = Unit<T>::kElements;
      for (int u = lane; u < shape.units; u += shape.lanes) {
        float x[kElements];
        Unit<T>::widen(__ldg(reinterpret_cast<const uint4*>(key) + u), x);
#pragma unroll
        for (int v = 0; v < Vectors; ++v) {
          const float4* y = reinterpret_cast<const float4*>(vectors + v * shape.pitch + u * kElements);
#pragma unroll
          for (int e = 0; e < kElements / 4; ++e) {
            const float4 four = y[e];
            dot[v] = fmaf(x[4 * e], four.x, dot[v]);
            dot[v] = fmaf(x[4 * e + 1], four.y, dot[v]);
            dot[v] = fmaf(x[4 * e + 2], four.z, dot[v]);
            dot[v] = fmaf(x[4 * e + 3], four.w, dot[v]);
          }
        }
      }
    } else {
      for (int d = lane; d < D; d += shape.lanes) {
        const float x = static_cast<float>(key[d]);
#pragma unroll
        for (int v = 0; v < Vectors; ++v) dot[v] = fmaf(x, vectors[v * shape.pitch + d], dot[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      for (int step = shape.lanes / 2; step > 0; step /= 2) dot[v] += __shfl_xor_sync(kAllLanes, dot[v], step);
      if (lane != 0 || !valid || first_vector + v >= shape.vectors) continue;
      if (few_rows) {
        const float x = dot[v] * a.scale_log2;
        logits[v * kKeysPerBlock + k] = x;
        a.logits[(head * M + v) * S + j] = x;
      } else {
        a.parts[(head * G + first_vector + v) * S + j] = dot[v] * a.problem.scale;
      }
    }
  }
  if (!few_rows) return;
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x) / 32, warp_lane = lane_of(32);
  if (m >= M) return;
  SoftmaxSum statistic;
  for (int k = warp_lane; k < kKeysPerBlock; k += 32) {
    if (first_key + k <= rows.last_key(m)) statistic.merge(logits[m * kKeysPerBlock + k], 1.0f);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const float max = __shfl_xor_sync(kAllLanes, statistic.max, step);
    const float sum = __shfl_xor_sync(kAllLanes, statistic.sum, step);
    statistic.merge(max, sum);
  }
  if (warp_lane == 0) {
    a.statistics[(head * a.plan.key_splits + blockIdx.x) * M + m] = {statistic.max, statistic.sum};
  }
}

// Few rows: probabilities, weighted and averaged over heads, for 64 keys. Four threads share a key's heads.
__global__ __launch_bounds__(kThreads, 4) void average_rows(const __grid_constant__ AttentionArguments a) {
  constexpr int kLanes = kThreads / kKeysPerBlock;
  EDGEPRUNE_SHARED(shared);
  float* sums = reinterpret_cast<float*>(shared);  // [kLanes][kKeysPerBlock]
  float* log2_sum = sums + kThreads;               // [Hkv][M]
  const int64_t b = blockIdx.z;
  const int S = a.problem.keys, G = a.problem.groups, M = a.plan.head_rows, heads = a.problem.key_heads;
  const int64_t first_head = b * heads;
  const int warp_lane = lane_of(32);
  for (int row = static_cast<int>(threadIdx.x) / 32; row < heads * M; row += kWarps) {
    SoftmaxSum statistic;
    for (int z = warp_lane; z < a.plan.key_splits; z += 32) {
      const float2 one = a.statistics[((first_head + row / M) * a.plan.key_splits + z) * M + row % M];
      statistic.merge(one.x, one.y);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const float max = __shfl_xor_sync(kAllLanes, statistic.max, step);
      const float sum = __shfl_xor_sync(kAllLanes, statistic.sum, step);
      statistic.merge(max, sum);
    }
    if (warp_lane == 0) log2_sum[row] = statistic.log2_sum();
  }
  __syncthreads();

  const int k = lane_of(kKeysPerBlock), lane = static_cast<int>(threadIdx.x) / kKeysPerBlock;
  const int j = static_cast<int>(blockIdx.x) * kKeysPerBlock + k;
  // Only positions and weights are asked of it: they are the same for all types and heads.
  const QueryRows<float> rows(a, 0);
  for (int g = 0; g < G; ++g) {
    float sum = 0;
    for (int m = 0; j < S && m < M; ++m) {
      if (j > rows.last_key(m)) continue;
      const float weight = rows.weight(g, m, b);
#pragma unroll 8
      for (int h = lane; h < heads; h += kLanes) {
        const float x = a.logits[((first_head + h) * M + m) * S + j];
        sum = fmaf(weight, exp2_fast(x - log2_sum[h * M + m]), sum);
      }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && j < S) {
      for (int other = 1; other < kLanes; ++other) sum += sums[other * kKeysPerBlock + k];
      a.score[(b * G + g) * S + j] = sum / static_cast<float>(a.problem.heads);
    }
    __syncthreads();
  }
}

template <typename T>
cudaError_t launch_multiply_keys(const AttentionArguments& a, int vectors, cudaStream_t stream) {
  const AttentionScoreProblem& p = a.problem;
  KeyRow shape = {};
  const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * static_cast<int64_t>(sizeof(T));
  shape.units = reads_units(a.key, row_bytes) ? static_cast<int>(row_bytes / 16) : 0;
  shape.vectors = vectors;
  shape.pitch = static_cast<int>(ceil_div(p.head_dim, 8) * 8);
  shape.lanes = 32;
  while (shape.units > 0 && shape.lanes / 2 >= shape.units && shape.lanes > 1) shape.lanes /= 2;
  const int per_block = vectors == 1 ? 1 : kMaxVectors;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.keys, kKeysPerBlock)), static_cast<unsigned>(p.batch * p.key_heads),
                  static_cast<unsigned>(ceil_div(vectors, per_block)));
  const size_t shared_bytes = sizeof(float) * static_cast<size_t>(per_block * (shape.pitch + kKeysPerBlock));
  if (per_block == 1) return launch(multiply_keys<T, 1>, grid, kThreads, shared_bytes, stream, a, shape);
  return launch(multiply_keys<T, kMaxVectors>, grid, kThreads, shared_bytes, stream, a, shape);
}

}  // namespace

cudaError_t score_few_rows(const AttentionArguments& a, cudaStream_t stream) {
  const AttentionScoreProblem& p = a.problem;
  const cudaError_t error = with_element_type(p.element_type, [&](auto element) {
    return launch_multiply_keys<decltype(element)>(a, a.plan.head_rows, stream);
  });
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.keys, kKeysPerBlock)), p.groups > 0 ? 1 : 0, p.batch);
  const size_t shared_bytes = sizeof(float) * static_cast<size_t>(kThreads + p.key_heads * a.plan.head_rows);
  return launch(average_rows, grid, kThreads, shared_bytes, stream, a);
}

cudaError_t score_logits(const AttentionArguments& a, cudaStream_t stream) {
  const AttentionScoreProblem& p = a.problem;
  int columns = 32;
  while (columns < p.head_dim) columns *= 2;
  const dim3 grid(a.plan.row_splits, static_cast<unsigned>(p.batch * p.key_heads), p.groups);
  const cudaError_t error = with_element_type(p.element_type, [&](auto element) {
    using T = decltype(element);
    const cudaError_t summed = launch(sum_rows<T>, grid, kThreads, sizeof(float) * kThreads, stream, a, columns);
    return summed != cudaSuccess ? summed : launch_multiply_keys<T>(a, p.groups, stream);
  });
  if (error != cudaSuccess) return error;
  return sum_parts(a, p.key_heads, 1.0f / static_cast<float>(p.heads), stream);
}

}  // namespace edgeprune
