// AttentionScore: weighted sums over query rows of the attention that each key receives, averaged over heads.
//
//   score[b, g, j] = Σ_r row_weight[g, r] · mean_h P[b, h, r, j]
//
// probabilities: P = softmax_j(scale · q_r · k_j), with `causal` over the keys up to row_index[r] only;
// logits: P = scale · q_r · k_j, no mask. Query head h uses key head h / (heads / key_heads).
#pragma once

#include "kernel_types.h"

namespace edgeprune {

enum class AttentionMode : int32_t { probabilities = 0, logits = 1 };

struct AttentionScoreProblem {
  ElementType element_type;  // of query and key; weights and scores are float32
  AttentionMode mode;
  int32_t causal;             // not 0: row r sees the keys 0 … row_index[r]
  int32_t weights_per_batch;  // not 0: row_weight is [B, G, R], else [G, R] for all
  int32_t batch;              // B
  int32_t heads;              // H
  int32_t key_heads;          // Hkv, divides H
  int32_t query_length;       // Q, rows in `query`
  int32_t rows;               // R, rows that score
  int32_t keys;               // S
  int32_t head_dim;           // D, at most 256
  int32_t groups;             // G
  float scale;
};

constexpr int32_t kMaxHeadDim = 256;

inline bool is_valid(const AttentionScoreProblem& p, const void* query_rows) {
  const bool sizes = p.batch >= 0 && p.heads > 0 && p.key_heads > 0 && p.query_length >= 0 && p.rows >= 0 &&
                     p.keys >= 0 && p.head_dim > 0 && p.head_dim <= kMaxHeadDim && p.groups >= 0;
  const bool mode = p.mode == AttentionMode::probabilities || p.mode == AttentionMode::logits;
  return sizes && mode && is_element_type(p.element_type) && p.heads % p.key_heads == 0 &&
         (query_rows != nullptr || p.query_length == p.rows);
}

}  // namespace edgeprune

// Bytes of workspace, 256-byte aligned; 0 for a problem that is not valid.
EDGEPRUNE_API size_t edgeprune_attention_score_workspace(const edgeprune::AttentionScoreProblem* problem);

// Bytes that are enough for the problem and for every smaller one: less batch, rows, keys or weightings. The workspace
// itself may grow where rows or keys become fewer.
EDGEPRUNE_API size_t edgeprune_attention_score_workspace_bound(const edgeprune::AttentionScoreProblem* problem);

// Shapes:
//   query: [B, H, Q, D]; key: [B, Hkv, S, D]
//   query_rows: [R], the rows of `query` that score, or null for all of them (then Q = R)
//   row_index: [R], position of each row among the keys; read if causal, in mode probabilities
//   row_weight: [G, R] or [B, G, R]; score: [B, G, S]
// A row that sees no key (row_index < 0) adds nothing. An index in query_rows outside of 0 … Q-1 is undefined.
// Returns cudaErrorInvalidValue for a problem that is not valid.
EDGEPRUNE_API cudaError_t edgeprune_attention_score(const edgeprune::AttentionScoreProblem* problem,
                                                    const void* query, const void* key,
                                                    const int64_t* query_rows, const int64_t* row_index,
                                                    const float* row_weight, float* score, void* workspace,
                                                    cudaStream_t stream);
