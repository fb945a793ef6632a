// TokenSelect: which rows of a sequence are kept, as a permutation and a count.
//
// keep_indices holds the kept rows, ascending, then the dropped rows, ascending. Rows that are not droppable (text)
// are always kept. NaN is the lowest score, below -inf; +0 equals -0; equal scores go to the lower index.
#pragma once

#include "kernel_types.h"

namespace edgeprune {

// What one block of 1024 threads holds in registers, and in shared memory for soft NMS.
constexpr int32_t kMaxSelectRows = 16384;

inline bool is_selection(int32_t batch, int32_t rows) {
  return batch >= 0 && rows >= 0 && rows <= kMaxSelectRows;
}

}  // namespace edgeprune

// Keeps the droppable rows whose score exceeds its threshold (strictly; false for NaN) in any of P pairs. Where none
// of the droppable rows does, the one with the highest score of pair 0 survives.
//
// Shapes: scores, thresholds: [B, P, S]; droppable: [B, S], 0 or 1; keep_indices: [B, S]; keep_count: [B]
// Returns cudaErrorInvalidValue for more than 16,384 rows or no pair.
EDGEPRUNE_API cudaError_t edgeprune_select_by_threshold(int32_t batch, int32_t pairs, int32_t rows,
                                                        const float* scores, const float* thresholds,
                                                        const uint8_t* droppable, int64_t* keep_indices,
                                                        int64_t* keep_count, cudaStream_t stream);

// Keeps the num_keep droppable rows with the highest scores; num_keep is clamped to 0 … number of droppable rows.
//
// Shapes: scores: [B, S]; num_keep: [B]; droppable: [B, S]; keep_indices: [B, S]; keep_count: [B]
// Returns cudaErrorInvalidValue for more than 16,384 rows.
EDGEPRUNE_API cudaError_t edgeprune_select_top_k(int32_t batch, int32_t rows, const float* scores,
                                                 const int64_t* num_keep, const uint8_t* droppable,
                                                 int64_t* keep_indices, int64_t* keep_count,
                                                 cudaStream_t stream);

namespace edgeprune {

struct SoftNmsProblem {
  ElementType feature_type;
  int32_t batch;        // B
  int32_t rows;         // S
  int32_t features;     // F, numbers per row that similarity is measured on
  int32_t table_size;   // W, entries of `nearness`, at least 1
  float similarity_sigma;
};

inline bool is_valid(const SoftNmsProblem& p) {
  return is_selection(p.batch, p.rows) && p.features >= 0 && p.table_size >= 1 &&
         is_element_type(p.feature_type) && p.similarity_sigma > 0;
}

}  // namespace edgeprune

// Bytes of workspace, 256-byte aligned; 0 for a problem that is not valid.
EDGEPRUNE_API size_t edgeprune_select_by_soft_nms_workspace(const edgeprune::SoftNmsProblem* problem);

// Keeps num_keep droppable rows, one after the other: the row with the highest score i, which multiplies the score of
// every row j by 1 - nearness[min(d², W-1)] · exp(-(1 - cos)² / 2σ²), with the squared distance of their places and
// the cosine of their features. Scores are clamped to finite numbers first, NaN to the lowest.
//
// Shapes:
//   scores: [B, S]; num_keep: [B]; droppable: [B, S]; features: [B, S, F], finite; places: [B, S, 2]
//   nearness: [W] in [0, 1]; keep_indices: [B, S]; keep_count: [B]
// Returns cudaErrorInvalidValue for a problem that is not valid.
EDGEPRUNE_API cudaError_t edgeprune_select_by_soft_nms(const edgeprune::SoftNmsProblem* problem,
                                                       const float* scores, const int64_t* num_keep,
                                                       const uint8_t* droppable, const void* features,
                                                       const int64_t* places, const float* nearness,
                                                       int64_t* keep_indices, int64_t* keep_count,
                                                       void* workspace, cudaStream_t stream);

// Bytes of workspace, 256-byte aligned; 0 for more than 16,384 rows. It is as large as the kernel: of every row, what
// each row kept before explains of it.
EDGEPRUNE_API size_t edgeprune_select_by_dpp_workspace(int32_t batch, int32_t rows);

// Keeps num_keep droppable rows, one after the other: the greedy MAP of a determinantal point process. A row's gain is
// kernel[i, i] less what the rows kept before explain of it; the row with the highest gain is kept, and it explains
// e² of row j of its group, e = (kernel[i, j] - Σ of what both share) / √(gain + 10⁻⁶). Gains are compared in steps of
// 2⁻¹⁶, and a row whose gain is less than half a step explains nothing. No group keeps more than its group_keep. Entries
// of the kernel that are NaN or infinite count as 0.
//
// Shapes:
//   kernel: [B, S, S], symmetric; num_keep: [B]; droppable: [B, S]
//   groups: [B, S], equal for the rows of a group; group_keep: [B, S], equal for the rows of a group
//   keep_indices: [B, S]; keep_count: [B]
// Returns cudaErrorInvalidValue for more than 16,384 rows.
EDGEPRUNE_API cudaError_t edgeprune_select_by_dpp(int32_t batch, int32_t rows, const float* kernel,
                                                  const int64_t* num_keep, const uint8_t* droppable,
                                                  const int64_t* groups, const int64_t* group_keep,
                                                  int64_t* keep_indices, int64_t* keep_count, void* workspace,
                                                  cudaStream_t stream);

namespace edgeprune {

constexpr float kDppSteps = 65536.0f;  // of a gain, per one
constexpr float kDppEpsilon = 1e-6f;

}  // namespace edgeprune
