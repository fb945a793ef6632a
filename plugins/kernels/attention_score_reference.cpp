// AttentionScore on the host, straight from the definition; sums are kept in double.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention_score.h"
#include "reference_numbers.h"

namespace edgeprune {
namespace {

// The logits of one row against all keys of its head.
void row_logits(const AttentionScoreProblem& p, const void* query, int64_t query_row, const void* key,
                int64_t first_key, std::vector<double>& logits) {
  const int64_t D = p.head_dim;
  std::vector<float> q(static_cast<size_t>(D));
  for (int64_t d = 0; d < D; ++d) q[d] = read_element(query, query_row * D + d, p.element_type);
  for (int64_t j = 0; j < p.keys; ++j) {
    double dot = 0;
    for (int64_t d = 0; d < D; ++d) {
      dot += static_cast<double>(q[d]) * read_element(key, (first_key + j) * D + d, p.element_type);
    }
    logits[j] = p.scale * dot;
  }
}

// Softmax over the first `seen` logits; the others get nothing.
void softmax(std::vector<double>& logits, int64_t seen) {
  double highest = -INFINITY, sum = 0;
  for (int64_t j = 0; j < seen; ++j) {
    if (logits[j] > highest) highest = logits[j];  // a NaN enters through the sum: the row becomes NaN
  }
  for (int64_t j = 0; j < seen; ++j) sum += logits[j] = std::exp(logits[j] - highest);
  for (int64_t j = 0; j < seen; ++j) logits[j] /= sum;
  for (int64_t j = std::max<int64_t>(seen, 0); j < static_cast<int64_t>(logits.size()); ++j) logits[j] = 0;
}

}  // namespace
}  // namespace edgeprune

size_t edgeprune_attention_score_workspace(const edgeprune::AttentionScoreProblem*) { return 0; }

size_t edgeprune_attention_score_workspace_bound(const edgeprune::AttentionScoreProblem*) { return 0; }

cudaError_t edgeprune_attention_score(const edgeprune::AttentionScoreProblem* problem, const void* query,
                                      const void* key, const int64_t* query_rows, const int64_t* row_index,
                                      const float* row_weight, float* score, void*, cudaStream_t) {
  using namespace edgeprune;
  const AttentionScoreProblem& p = *problem;
  if (!is_valid(p, query_rows)) return cudaErrorInvalidValue;
  const int64_t S = p.keys, R = p.rows, G = p.groups, heads_per_key = p.heads / p.key_heads;
  std::vector<double> row(static_cast<size_t>(S)), sums(static_cast<size_t>(G * S));
  for (int64_t b = 0; b < p.batch; ++b) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t r = 0; r < R; ++r) {
        const int64_t query_row = (b * p.heads + h) * p.query_length + (query_rows ? query_rows[r] : r);
        row_logits(p, query, query_row, key, (b * p.key_heads + h / heads_per_key) * S, row);
        if (p.mode == AttentionMode::probabilities) {
          softmax(row, p.causal ? std::min(S, row_index[r] + 1) : S);
        }
        for (int64_t g = 0; g < G; ++g) {
          const double weight = row_weight[((p.weights_per_batch ? b : 0) * G + g) * R + r];
          for (int64_t j = 0; j < S; ++j) sums[g * S + j] += weight * row[j];
        }
      }
    }
    for (int64_t i = 0; i < G * S; ++i) score[b * G * S + i] = static_cast<float>(sums[i] / p.heads);
  }
  return cudaSuccess;
}
