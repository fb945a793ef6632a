// How AttentionScore is divided among blocks, and where its intermediate results lie in the workspace.
//
// The division depends on sizes alone and not on the GPU: sums are added in the same order everywhere.
#pragma once

#include <algorithm>

#include "attention_score.h"
#include "device.cuh"

namespace edgeprune {

// Blocks that a launch should have at least, to fill 132 multiprocessors twice.
constexpr int64_t kEnoughBlocks = 264;
// Rows that share a key head, up to which keys are multiplied with vectors instead of tiles: a matrix tile of 64 rows
// would be mostly padding, and the logits of so few rows are small enough to be written down.
constexpr int32_t kFewRows = 8;
constexpr int32_t kKeysPerBlock = 64;   // of the kernels that multiply keys with vectors
constexpr int32_t kMinRowsPerSum = 64;  // of the kernel that sums rows up, in mode logits
constexpr int32_t kMaxRowSums = 16;

// The tiles of one configuration: a block keeps `stationary` rows of one operand and streams tiles of `moving` rows
// of the other past them.
struct TileSizes {
  int32_t stationary, moving;
};

constexpr TileSizes kWideTiles = {128, 64};   // 16-bit numbers, D ≤ 128
constexpr TileSizes kNarrowTiles = {64, 32};  // float32, or D > 128

enum class AttentionPath { few_rows, tiles, logits };

struct AttentionPlan {
  AttentionPath path;
  int32_t head_rows;   // M, rows that share a key head: R for each of its query heads
  TileSizes tile;
  int32_t key_splits;  // tiles: blocks that share the keys of a row; few rows: runs of keys per head
  int32_t row_splits;  // tiles: blocks that share the rows of a key; logits: partial sums of rows
  int64_t statistics;  // offset: maximum and sum of each row and split, [B·Hkv, key_splits, M] float2
  int64_t vectors;     // offset: weighted sums of rows (logits), [B·Hkv, row_splits, G, D] float32
  int64_t logits;      // offset: logits of few rows, [B·Hkv, M, S] float32
  int64_t parts;       // offset: unfinished scores, [B, Hkv·row_splits or Hkv, G, S] float32
  int64_t bytes;
};

inline int32_t splits_for(int64_t blocks, int64_t pieces, int64_t most) {
  return static_cast<int32_t>(std::clamp<int64_t>(ceil_div(kEnoughBlocks, std::max<int64_t>(blocks, 1)), 1,
                                                  std::clamp<int64_t>(pieces, 1, most)));
}

inline AttentionPlan plan_attention(const AttentionScoreProblem& p) {
  AttentionPlan plan = {};
  const int64_t heads = static_cast<int64_t>(p.batch) * p.key_heads;
  plan.head_rows = p.heads / p.key_heads * p.rows;
  const bool wide = p.element_type != ElementType::float32 && p.head_dim <= 128;
  plan.tile = wide ? kWideTiles : kNarrowTiles;
  int64_t offset = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t at = offset;
    offset += static_cast<int64_t>(align_256(static_cast<size_t>(count * size)));
    return at;
  };
  plan.key_splits = plan.row_splits = 1;
  if (p.mode == AttentionMode::logits) {
    plan.path = AttentionPath::logits;
    plan.row_splits = static_cast<int32_t>(
        std::clamp<int64_t>(ceil_div(plan.head_rows, kMinRowsPerSum), 1, kMaxRowSums));
    plan.vectors = reserve(heads * plan.row_splits * p.groups * p.head_dim, sizeof(float));
    plan.parts = reserve(heads * p.groups * p.keys, sizeof(float));
  } else if (plan.head_rows <= kFewRows) {
    plan.path = AttentionPath::few_rows;
    plan.key_splits = static_cast<int32_t>(ceil_div(p.keys, kKeysPerBlock));
    plan.statistics = reserve(heads * plan.key_splits * plan.head_rows, 2 * sizeof(float));
    plan.logits = reserve(heads * plan.head_rows * p.keys, sizeof(float));
  } else {
    plan.path = AttentionPath::tiles;
    const int64_t row_tiles = ceil_div(plan.head_rows, plan.tile.stationary);
    const int64_t key_tiles = ceil_div(p.keys, plan.tile.stationary);
    plan.key_splits = splits_for(heads * row_tiles, ceil_div(p.keys, plan.tile.moving), 8);
    plan.row_splits = splits_for(heads * key_tiles, ceil_div(plan.head_rows, plan.tile.moving), 32);
    plan.statistics = reserve(heads * plan.key_splits * plan.head_rows, 2 * sizeof(float));
    plan.parts = reserve(heads * plan.row_splits * p.groups * p.keys, sizeof(float));
  }
  plan.bytes = offset;
  return plan;
}

// At least the bytes of the plan of this problem and of every smaller one. Splits fill up a launch, so blocks times
// splits exceed the blocks by kEnoughBlocks at most.
inline int64_t workspace_bound(const AttentionScoreProblem& p) {
  const AttentionPlan plan = plan_attention(p);
  if (plan.path == AttentionPath::logits) return plan.bytes;
  const int64_t heads = static_cast<int64_t>(p.batch) * p.key_heads, keys = p.keys, M = plan.head_rows;
  const int64_t few = std::min<int64_t>(M, kFewRows), margin = 512;  // what alignment adds
  const int64_t few_rows = heads * few * (ceil_div(keys, kKeysPerBlock) * 8 + keys * 4) + margin;
  if (plan.path == AttentionPath::few_rows) return few_rows;
  const int64_t S = plan.tile.stationary;
  const int64_t statistics = (heads * ceil_div(M, S) + kEnoughBlocks) * S * 8;
  const int64_t parts = (heads * ceil_div(keys, S) + kEnoughBlocks) * S * p.groups * 4;
  return std::max(few_rows, statistics + parts + margin);
}

// Everything that the kernels are given.
struct AttentionArguments {
  AttentionScoreProblem problem;
  AttentionPlan plan;
  FastDivide per_head;  // R: rows of one query head among those of a key head
  float scale_log2;     // scale · log₂ e, because exp₂ is what the hardware has
  const void* query;
  const void* key;
  const int64_t* query_rows;
  const int64_t* row_index;
  const float* row_weight;
  float* score;
  float2* statistics;
  float* vectors;
  float* logits;
  float* parts;
};

cudaError_t score_few_rows(const AttentionArguments& arguments, cudaStream_t stream);
cudaError_t score_logits(const AttentionArguments& arguments, cudaStream_t stream);
cudaError_t score_tiles(const AttentionArguments& arguments, cudaStream_t stream);

// score = Σ over `count` parts · factor, [B, count, G, S] → [B, G, S].
cudaError_t sum_parts(const AttentionArguments& arguments, int32_t count, float factor, cudaStream_t stream);

// Calls run with a value of the element type.
template <typename Run>
cudaError_t with_element_type(ElementType type, Run run) {
  switch (type) {
    case ElementType::float32: return run(float{});
    case ElementType::float16: return run(__half{});
    default: return run(__nv_bfloat16{});
  }
}

}  // namespace edgeprune
