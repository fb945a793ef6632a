// Tiles in shared memory and their product on tensor cores (16-bit numbers) or in float32.
//
// A tile's row takes an odd number of 16-byte units: the eight rows that are read together then lie in different
// banks. Rows behind the end and numbers behind D are zeros, which add nothing to a product.
#pragma once

#include "attention_rows.cuh"

namespace edgeprune {

// WarpRows × 2 warps, each with 32 stationary rows and 8·Columns moving rows.
template <typename T, int WarpRows, int Columns>
struct Tile {
  static constexpr int kThreads = 64 * WarpRows;
  static constexpr int kStationary = 32 * WarpRows;
  static constexpr int kMoving = 16 * Columns;
  static constexpr int kUnit = 16 / static_cast<int>(sizeof(T));  // numbers in 16 bytes
  // Numbers that one step of the product takes: a matrix instruction's 16, or one unit.
  static constexpr int kStep = sizeof(T) == 2 ? 16 : kUnit;
};

// How a row of D numbers lies in a tile.
struct TileRow {
  int units;       // 16-byte units that are multiplied, the last ones perhaps zeros
  int data_units;  // of these, units that are read at once; 0: numbers are read one by one
  int pitch;       // bytes from row to row
  int lane_shift;  // 2^lane_shift threads copy a row
  int stages;      // moving tiles in shared memory: 2 if they fit, so that one is copied while one is multiplied
};

// Copies rows first … of an operand into a tile; the copies may be under way when it returns. `row_at(i)` is the
// address of row i < end.
template <typename T, int Rows, int Threads, typename RowAt>
__device__ void copy_tile(char* tile, const TileRow& shape, int head_dim, int first, int end, const RowAt& row_at) {
  const int lanes = 1 << shape.lane_shift;
  const int unit0 = static_cast<int>(threadIdx.x) & (lanes - 1);
  constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  for (int r = static_cast<int>(threadIdx.x) >> shape.lane_shift; r < Rows; r += Threads >> shape.lane_shift) {
    const bool valid = first + r < end;
    const T* source = row_at(valid ? first + r : end - 1);
    char* target = tile + r * shape.pitch;
    if (shape.data_units > 0) {
      for (int u = unit0; u < shape.units; u += lanes) {
        const bool data = valid && u < shape.data_units;
        copy_async(target + u * 16, source + (data ? u * kUnit : 0), data);
      }
    } else {
      T* numbers = reinterpret_cast<T*>(target);
      for (int d = unit0; d < shape.units * kUnit; d += lanes) {
        numbers[d] = valid && d < head_dim ? source[d] : static_cast<T>(0.0f);
      }
    }
  }
}

// c[i][n][e]: product of stationary row 32·warp_row + 16·i + 8·(e / 2) + lane / 4 and moving row
// 8·Columns·warp_column + 8·n + 2·(lane % 4) + e % 2. This is how matrix instructions leave their results.
template <typename T, int Columns>
__device__ void multiply_tiles(float (&c)[2][Columns][4], const char* stationary, const char* moving,
                               const TileRow& shape, int warp_row, int warp_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < Columns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][n][e] = 0;
    }
  }
  if constexpr (sizeof(T) == 2) {
    // Matrices are read in the order in which the instruction wants them: for the stationary operand rows 0-7 and
    // 8-15 of the first unit, then of the second; for the moving one both units of rows 0-7, then of rows 8-15.
    const char* a_row = stationary + (warp_row * 32 + lane % 16) * shape.pitch + lane / 16 * 16;
    const char* b_row =
        moving + (warp_column * 8 * Columns + lane % 8 + lane / 16 * 8) * shape.pitch + lane / 8 % 2 * 16;
#pragma unroll 1  // unrolled, row_statistics spills on sm_80; three resident blocks hide what a step waits for
    for (int unit = 0; unit < shape.units; unit += 2) {
      uint32_t a[2][4], b[Columns / 2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices(a[i], a_row + i * 16 * shape.pitch + unit * 16);
#pragma unroll
      for (int n = 0; n < Columns / 2; ++n) load_matrices(b[n], b_row + n * 16 * shape.pitch + unit * 16);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int n = 0; n < Columns; ++n) {
          multiply_matrices<T>(c[i][n], a[i], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
  } else {
    const char* a_row = stationary + (warp_row * 32 + lane / 4) * shape.pitch;
    const char* b_row = moving + (warp_column * 8 * Columns + lane % 4 * 2) * shape.pitch;
    for (int unit = 0; unit < shape.units; ++unit) {
      float4 a[4], b[2 * Columns];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = *reinterpret_cast<const float4*>(a_row + r * 8 * shape.pitch + unit * 16);
#pragma unroll
      for (int n = 0; n < 2 * Columns; ++n) {
        b[n] = *reinterpret_cast<const float4*>(b_row + (n / 2 * 8 + n % 2) * shape.pitch + unit * 16);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int n = 0; n < 2 * Columns; ++n) {
          float& sum = c[r / 2][n / 2][r % 2 * 2 + n % 2];
          sum = fmaf(a[r].x, b[n].x, sum);
          sum = fmaf(a[r].y, b[n].y, sum);
          sum = fmaf(a[r].z, b[n].z, sum);
          sum = fmaf(a[r].w, b[n].w, sum);
        }
      }
    }
  }
}

// The shape of a tile's rows, and the shared memory of a block without and with a second moving tile.
template <typename T, int WarpRows, int Columns>
TileRow tile_row(const AttentionScoreProblem& p, const void* query, const void* key) {
  using Sizes = Tile<T, WarpRows, Columns>;
  TileRow row = {};
  row.units = static_cast<int>(ceil_div(p.head_dim, Sizes::kStep) * Sizes::kStep / Sizes::kUnit);
  const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * static_cast<int64_t>(sizeof(T));
  row.data_units = reads_units(query, row_bytes) && reads_units(key, row_bytes) ? static_cast<int>(row_bytes / 16) : 0;
  row.pitch = 16 * (row.units | 1);
  while (row.lane_shift < 5 && (1 << row.lane_shift) < row.units) ++row.lane_shift;
  // Blocks of sm_86, sm_89 and sm_120 have 99 KiB; 64 rows of float32 and D = 256 leave room for one moving tile.
  row.stages = row.pitch * (Sizes::kStationary + 2 * Sizes::kMoving) <= 80 * 1024 ? 2 : 1;
  return row;
}

}  // namespace edgeprune
