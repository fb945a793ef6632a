// AttentionScore for many rows: two passes over tiles, with the operands' roles exchanged.
//
// Pass 1, row_statistics: a block keeps rows of the query and streams keys past them; each thread carries the maximum
// and the sum of exponentials of its own few columns, merged at the end.
// Pass 2, column_sums: a block keeps keys and streams rows past them; the probabilities are weighted and added up in
// registers, so a column sum is never spread over blocks but for the fixed parts that are added last.
// All additions have one order: no atomics, the same scores in every run and on every GPU.
#include "attention_tiles.cuh"

namespace edgeprune {
namespace {

// Blocks that a multiprocessor should hold, as far as registers go: three of the wide tiles fit the shared memory of
// sm_80, sm_87 and sm_90 at D = 128.
template <int WarpRows, int Groups>
constexpr int kResident = WarpRows == 4 && Groups == 1 ? 3 : 2;

template <typename T, int WarpRows, int Columns>
__global__ __launch_bounds__(64 * WarpRows, kResident<WarpRows, 1>) void row_statistics(const __grid_constant__ AttentionArguments a,
                                                                const __grid_constant__ TileRow shape) {
  using Sizes = Tile<T, WarpRows, Columns>;
  EDGEPRUNE_SHARED(shared);
  char* stationary = shared;
  char* moving = shared + Sizes::kStationary * shape.pitch;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / 2, warp_column = warp % 2;
  const int64_t head = blockIdx.y;
  const int D = a.problem.head_dim, S = a.problem.keys, M = a.plan.head_rows;
  const int first_row = static_cast<int>(blockIdx.x) * Sizes::kStationary;
  const QueryRows<T> rows(a, head);
  const T* keys = static_cast<const T*>(a.key) + head * S * D;
  const auto key_at = [&](int j) { return keys + static_cast<int64_t>(j) * D; };

  const auto row_of = [&](int i, int half) { return first_row + warp_row * 32 + i * 16 + half * 8 + lane / 4; };
  int last_key[2][2], furthest = -1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row_of(i, half);
      last_key[i][half] = m < M ? rows.last_key(m) : -1;
      furthest = max(furthest, last_key[i][half]);
    }
  }
  // Tiles behind what any row of this block sees are not looked at.
  int* furthest_of_warp = reinterpret_cast<int*>(shared);
  furthest = __reduce_max_sync(kAllLanes, furthest);
  if (lane == 0) furthest_of_warp[warp] = furthest;
  __syncthreads();
  for (int other = 0; other < 2 * WarpRows; ++other) furthest = max(furthest, furthest_of_warp[other]);
  __syncthreads();
  const int tiles = static_cast<int>(ceil_div(S, Sizes::kMoving));
  const int per_split = static_cast<int>(ceil_div(tiles, a.plan.key_splits));
  const int begin = static_cast<int>(blockIdx.z) * per_split;
  const int end = min(min(begin + per_split, tiles), furthest < 0 ? 0 : furthest / Sizes::kMoving + 1);

  SoftmaxSum statistic[2][2];
  const auto copy_keys = [&](int tile) {
    char* target = moving + (shape.stages == 2 ? (tile - begin) % 2 * Sizes::kMoving * shape.pitch : 0);
    copy_tile<T, Sizes::kMoving, Sizes::kThreads>(target, shape, D, tile * Sizes::kMoving, S, key_at);
    copy_async_commit();
    return target;
  };
  if (begin < end) {
    copy_tile<T, Sizes::kStationary, Sizes::kThreads>(stationary, shape, D, first_row, M, rows);
    copy_keys(begin);
  }
  for (int tile = begin; tile < end; ++tile) {
    const bool ahead = shape.stages == 2 && tile + 1 < end;
    if (ahead) {
      copy_keys(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // the tile is there for all
    const char* current = moving + (shape.stages == 2 ? (tile - begin) % 2 * Sizes::kMoving * shape.pitch : 0);
    float c[2][Columns][4];
    multiply_tiles<T, Columns>(c, stationary, current, shape, warp_row, warp_column);
    __syncthreads();  // it may be overwritten
    if (shape.stages == 1 && tile + 1 < end) copy_keys(tile + 1);
    const int first_key = tile * Sizes::kMoving + warp_column * 8 * Columns + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = statistic[i][half].max;
#pragma unroll
        for (int n = 0; n < Columns; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = c[i][n][half * 2 + e];
            x = first_key + n * 8 + e <= last_key[i][half] ? x * a.scale_log2 : -INFINITY;
            highest = fmaxf(highest, x);
          }
        }
        const float base = SoftmaxSum::base(highest);
        float sum = statistic[i][half].sum * exp2_fast(statistic[i][half].max - base);
#pragma unroll
        for (int n = 0; n < Columns; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) sum += exp2_fast(c[i][n][half * 2 + e] - base);
        }
        statistic[i][half].max = highest;
        statistic[i][half].sum = sum;
      }
    }
  }

  // The four lanes that share a row, then the two warps that do. The tiles' memory is free by now.
  float2* of_column = reinterpret_cast<float2*>(shared);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      SoftmaxSum& one = statistic[i][half];
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float max = __shfl_xor_sync(kAllLanes, one.max, step), sum = __shfl_xor_sync(kAllLanes, one.sum, step);
        one.merge(max, sum);
      }
      if (warp_column == 1 && lane % 4 == 0) of_column[row_of(i, half) - first_row] = {one.max, one.sum};
    }
  }
  __syncthreads();
  if (warp_column == 1 || lane % 4 != 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int m = row_of(i, half);
      const float2 other = of_column[m - first_row];
      statistic[i][half].merge(other.x, other.y);
      if (m < M) {
        a.statistics[(head * a.plan.key_splits + blockIdx.z) * M + m] = {statistic[i][half].max,
                                                                         statistic[i][half].sum};
      }
    }
  }
}

// What pass 2 knows of the rows of one moving tile.
template <int Rows, int Groups>
struct RowFacts {
  float log2_sum[Rows];
  int last_key[Rows];
  float weight[Groups][Rows];
};

template <typename T, int WarpRows, int Columns, int Groups>
__global__ __launch_bounds__(64 * WarpRows, kResident<WarpRows, Groups>) void column_sums(const __grid_constant__ AttentionArguments a,
                                                             const __grid_constant__ TileRow shape) {
  using Sizes = Tile<T, WarpRows, Columns>;
  using Facts = RowFacts<Sizes::kMoving, Groups>;
  EDGEPRUNE_SHARED(shared);
  char* stationary = shared;
  char* moving = shared + Sizes::kStationary * shape.pitch;
  Facts* facts = reinterpret_cast<Facts*>(moving + shape.stages * Sizes::kMoving * shape.pitch);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_row = warp / 2, warp_column = warp % 2;
  const int64_t head = blockIdx.y;
  const int D = a.problem.head_dim, S = a.problem.keys, M = a.plan.head_rows, G = a.problem.groups;
  const int first_key = static_cast<int>(blockIdx.x) * Sizes::kStationary;
  const int split = static_cast<int>(blockIdx.z) % a.plan.row_splits;
  const int first_group = static_cast<int>(blockIdx.z) / a.plan.row_splits * Groups;
  const QueryRows<T> rows(a, head);
  const T* keys = static_cast<const T*>(a.key) + head * S * D;
  const auto key_at = [&](int j) { return keys + static_cast<int64_t>(j) * D; };
  const int tiles = static_cast<int>(ceil_div(M, Sizes::kMoving));
  const int per_split = static_cast<int>(ceil_div(tiles, a.plan.row_splits));
  const int end = min((split + 1) * per_split, tiles);

  // Writes the facts of the first tile from `tile` on whose rows see any key of this block; returns that tile.
  const auto next_visible = [&](int tile, Facts& fact) {
    for (; tile < end; ++tile) {
      int last_key = -1;
      const int t = static_cast<int>(threadIdx.x), m = tile * Sizes::kMoving + t;
      if (t < Sizes::kMoving) {
        SoftmaxSum statistic;
        if (m < M) {
          last_key = rows.last_key(m);
          for (int z = 0; z < a.plan.key_splits; ++z) {
            const float2 one = a.statistics[(head * a.plan.key_splits + z) * M + m];
            statistic.merge(one.x, one.y);
          }
        }
        fact.log2_sum[t] = statistic.log2_sum();
        fact.last_key[t] = last_key;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          const bool used = m < M && first_group + g < G;
          fact.weight[g][t] = used ? rows.weight(first_group + g, m, head / a.problem.key_heads) : 0.0f;
        }
      }
      if (__syncthreads_or(last_key >= first_key)) break;
    }
    return tile;
  };
  int stage = 0;
  const auto stage_at = [&](int s) { return moving + s * Sizes::kMoving * shape.pitch; };
  const auto copy_rows = [&](int tile, int s) {
    copy_tile<T, Sizes::kMoving, Sizes::kThreads>(stage_at(s), shape, D, tile * Sizes::kMoving, M, rows);
    copy_async_commit();
  };

  float sum[Groups][2][2] = {};
  int tile = next_visible(split * per_split, facts[0]), slot = 0;
  if (tile < end) {
    copy_tile<T, Sizes::kStationary, Sizes::kThreads>(stationary, shape, D, first_key, S, key_at);
    copy_rows(tile, 0);
  }
  while (tile < end) {
    const int next = next_visible(tile + 1, facts[slot ^ 1]);
    if (shape.stages == 2 && next < end) {
      copy_rows(next, stage ^ 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();  // the tile and its facts are there for all
    float c[2][Columns][4];
    multiply_tiles<T, Columns>(c, stationary, stage_at(stage), shape, warp_row, warp_column);
    const Facts& fact = facts[slot];
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = warp_column * 8 * Columns + n * 8 + lane % 4 * 2 + e;
        const float log2_sum = fact.log2_sum[column];
        const int last_key = fact.last_key[column];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int j = first_key + warp_row * 32 + i * 16 + half * 8 + lane / 4;
            const float x = fmaf(c[i][n][half * 2 + e], a.scale_log2, -log2_sum);
            const float probability = j <= last_key ? exp2_fast(x) : 0.0f;
#pragma unroll
            for (int g = 0; g < Groups; ++g) {
              sum[g][i][half] = fmaf(fact.weight[g][column], probability, sum[g][i][half]);
            }
          }
        }
      }
    }
    __syncthreads();  // tile and facts may be overwritten
    if (shape.stages == 1 && next < end) copy_rows(next, 0);
    stage = shape.stages == 2 ? stage ^ 1 : 0;
    slot ^= 1;
    tile = next;
  }

  // The four lanes that share a key, then the two warps that do.
  float* of_column = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& one = sum[g][i][half];
        one += __shfl_xor_sync(kAllLanes, one, 1);
        one += __shfl_xor_sync(kAllLanes, one, 2);
        const int k = warp_row * 32 + i * 16 + half * 8 + lane / 4;
        if (warp_column == 1 && lane % 4 == 0) of_column[g * Sizes::kStationary + k] = one;
      }
    }
  }
  __syncthreads();
  if (warp_column == 1 || lane % 4 != 0) return;
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int k = warp_row * 32 + i * 16 + half * 8 + lane / 4;
        if (first_key + k >= S || first_group + g >= G) continue;
        a.parts[((head * a.plan.row_splits + split) * G + first_group + g) * S + first_key + k] =
            sum[g][i][half] + of_column[g * Sizes::kStationary + k];
      }
    }
  }
}

constexpr int kManyGroups = 4;  // weightings that one block of pass 2 sums up

template <typename T, int WarpRows, int Columns>
cudaError_t score_with(const AttentionArguments& a, cudaStream_t stream) {
  using Sizes = Tile<T, WarpRows, Columns>;
  const AttentionScoreProblem& p = a.problem;
  const TileRow shape = tile_row<T, WarpRows, Columns>(p, a.query, a.key);
  const size_t tiles = static_cast<size_t>(shape.pitch) * (Sizes::kStationary + shape.stages * Sizes::kMoving);
  const unsigned heads = static_cast<unsigned>(p.batch * p.key_heads);
  const dim3 row_grid(static_cast<unsigned>(ceil_div(a.plan.head_rows, Sizes::kStationary)), heads,
                      static_cast<unsigned>(a.plan.key_splits));
  const cudaError_t error =
      launch(row_statistics<T, WarpRows, Columns>, row_grid, Sizes::kThreads, tiles, stream, a, shape);
  if (error != cudaSuccess) return error;
  const int groups = p.groups == 1 ? 1 : kManyGroups;
  const dim3 key_grid(static_cast<unsigned>(ceil_div(p.keys, Sizes::kStationary)), heads,
                      static_cast<unsigned>(a.plan.row_splits * ceil_div(p.groups, groups)));
  if (groups == 1) {
    return launch(column_sums<T, WarpRows, Columns, 1>, key_grid, Sizes::kThreads,
                  tiles + 2 * sizeof(RowFacts<Sizes::kMoving, 1>), stream, a, shape);
  }
  return launch(column_sums<T, WarpRows, Columns, kManyGroups>, key_grid, Sizes::kThreads,
                tiles + 2 * sizeof(RowFacts<Sizes::kMoving, kManyGroups>), stream, a, shape);
}

}  // namespace

cudaError_t score_tiles(const AttentionArguments& a, cudaStream_t stream) {
  const cudaError_t error = with_element_type(a.problem.element_type, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      if (a.plan.tile.stationary == kWideTiles.stationary) return score_with<T, 4, 4>(a, stream);
    }
    return score_with<T, 2, 2>(a, stream);
  });
  if (error != cudaSuccess) return error;
  return sum_parts(a, a.problem.key_heads * a.plan.row_splits, 1.0f / static_cast<float>(a.problem.heads), stream);
}

}  // namespace edgeprune
