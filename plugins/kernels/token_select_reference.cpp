// TokenSelect on the host: plain sorts, and greedy choice for soft NMS.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <vector>

#include "reference_numbers.h"
#include "token_select.h"

namespace edgeprune {
namespace {

// Whether row i comes before row j: by score, NaN behind all numbers, ties by index.
bool is_better(const float* score, int64_t i, int64_t j) {
  const bool nan_i = std::isnan(score[i]), nan_j = std::isnan(score[j]);
  if (nan_i != nan_j) return nan_j;
  if (!nan_i && score[i] != score[j]) return score[i] > score[j];
  return i < j;
}

void partition(const std::vector<bool>& keep, int64_t* keep_indices, int64_t* keep_count) {
  int64_t next = 0;
  for (const bool kept : {true, false}) {
    for (size_t i = 0; i < keep.size(); ++i) {
      if (keep[i] == kept) keep_indices[next++] = static_cast<int64_t>(i);
    }
    if (kept) *keep_count = next;
  }
}

std::vector<bool> text_rows(const uint8_t* droppable, int64_t rows) {
  std::vector<bool> keep(static_cast<size_t>(rows));
  for (int64_t i = 0; i < rows; ++i) keep[i] = !droppable[i];
  return keep;
}

std::vector<int64_t> droppable_rows(const uint8_t* droppable, int64_t rows) {
  std::vector<int64_t> found;
  for (int64_t i = 0; i < rows; ++i) {
    if (droppable[i]) found.push_back(i);
  }
  return found;
}

// Rows of length one, as the torch reference makes them; a row of zeros stays so.
std::vector<float> unit_rows(const void* features, int64_t first, const SoftNmsProblem& p) {
  std::vector<float> rows(static_cast<size_t>(p.rows) * p.features);
  for (int64_t i = 0; i < p.rows; ++i) {
    double squares = 0;
    for (int64_t f = 0; f < p.features; ++f) {
      const float value = read_element(features, (first + i) * p.features + f, p.feature_type);
      rows[i * p.features + f] = value;
      squares += static_cast<double>(value) * value;
    }
    const float length = std::max(static_cast<float>(std::sqrt(squares)), 1e-12f);
    for (int64_t f = 0; f < p.features; ++f) rows[i * p.features + f] /= length;
  }
  return rows;
}

void soft_nms(const SoftNmsProblem& p, std::vector<float>& score, int64_t num_keep, const uint8_t* droppable,
              const std::vector<float>& direction, const int64_t* places, const float* nearness,
              std::vector<bool>& keep) {
  std::vector<int64_t> open = droppable_rows(droppable, p.rows);
  const float slope = -0.5f / (p.similarity_sigma * p.similarity_sigma);
  for (int64_t n = 0; n < num_keep && !open.empty(); ++n) {
    const auto best = std::min_element(
        open.begin(), open.end(), [&](int64_t i, int64_t j) { return is_better(score.data(), i, j); });
    const int64_t chosen = *best;
    open.erase(best);
    keep[chosen] = true;
    for (const int64_t j : open) {
      const int64_t down = places[2 * j] - places[2 * chosen], right = places[2 * j + 1] - places[2 * chosen + 1];
      const float near = nearness[std::min<int64_t>(down * down + right * right, p.table_size - 1)];
      double cosine = 0;
      for (int64_t f = 0; f < p.features; ++f) {
        cosine += static_cast<double>(direction[j * p.features + f]) * direction[chosen * p.features + f];
      }
      const float unlike = 1.0f - static_cast<float>(cosine);
      score[j] *= 1.0f - near * std::exp(slope * (unlike * unlike));
    }
  }
}

double finite_or_zero(float value) { return std::isfinite(value) ? value : 0.0; }

void dpp(int64_t S, const float* kernel, int64_t num_keep, const uint8_t* droppable, const int64_t* groups,
         const int64_t* group_keep, std::vector<bool>& keep) {
  std::vector<double> gain(S);
  std::vector<int64_t> taken(S);                // of the row's group
  std::vector<std::vector<double>> shares(S);  // what each row kept before explains of the row
  for (int64_t i = 0; i < S; ++i) gain[i] = finite_or_zero(kernel[i * S + i]);
  const auto steps_of = [&](int64_t i) {
    return std::max(std::nearbyint(static_cast<float>(gain[i]) * kDppSteps), 0.0f);
  };
  for (int64_t n = 0; n < num_keep; ++n) {
    int64_t chosen = -1;
    for (int64_t i = 0; i < S; ++i) {
      const bool open = droppable[i] && !keep[i] && taken[i] < group_keep[i];
      if (open && (chosen < 0 || steps_of(i) > steps_of(chosen))) chosen = i;
    }
    if (chosen < 0) return;
    keep[chosen] = true;
    const bool explains = steps_of(chosen) > 0;
    const double root = std::sqrt(gain[chosen] + kDppEpsilon);
    const std::vector<double> own = shares[chosen];
    for (int64_t j = 0; j < S; ++j) {
      if (groups[j] != groups[chosen]) continue;
      ++taken[j];
      if (!explains) continue;
      double entry = finite_or_zero(kernel[chosen * S + j]);
      for (size_t u = 0; u < own.size(); ++u) entry -= own[u] * shares[j][u];
      entry /= root;
      shares[j].push_back(entry);
      gain[j] -= entry * entry;
    }
  }
}

}  // namespace
}  // namespace edgeprune

cudaError_t edgeprune_select_by_threshold(int32_t batch, int32_t pairs, int32_t rows, const float* scores,
                                          const float* thresholds, const uint8_t* droppable,
                                          int64_t* keep_indices, int64_t* keep_count, cudaStream_t) {
  using namespace edgeprune;
  if (!is_selection(batch, rows) || pairs < 1) return cudaErrorInvalidValue;
  const int64_t S = rows;
  for (int64_t b = 0; b < batch; ++b, droppable += S, scores += pairs * S, thresholds += pairs * S) {
    std::vector<bool> keep = text_rows(droppable, S);
    const std::vector<int64_t> candidates = droppable_rows(droppable, S);
    bool any = false;
    for (const int64_t i : candidates) {
      for (int64_t p = 0; p < pairs; ++p) {
        if (scores[p * S + i] > thresholds[p * S + i]) any = keep[i] = true;
      }
    }
    if (!any && !candidates.empty()) {
      keep[*std::min_element(candidates.begin(), candidates.end(),
                             [&](int64_t i, int64_t j) { return is_better(scores, i, j); })] = true;
    }
    partition(keep, keep_indices + b * S, keep_count + b);
  }
  return cudaSuccess;
}

cudaError_t edgeprune_select_top_k(int32_t batch, int32_t rows, const float* scores, const int64_t* num_keep,
                                   const uint8_t* droppable, int64_t* keep_indices, int64_t* keep_count,
                                   cudaStream_t) {
  using namespace edgeprune;
  if (!is_selection(batch, rows)) return cudaErrorInvalidValue;
  const int64_t S = rows;
  for (int64_t b = 0; b < batch; ++b, droppable += S, scores += S) {
    std::vector<bool> keep = text_rows(droppable, S);
    std::vector<int64_t> order = droppable_rows(droppable, S);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return is_better(scores, i, j); });
    const int64_t kept = std::clamp<int64_t>(num_keep[b], 0, static_cast<int64_t>(order.size()));
    for (int64_t n = 0; n < kept; ++n) keep[order[n]] = true;
    partition(keep, keep_indices + b * S, keep_count + b);
  }
  return cudaSuccess;
}

size_t edgeprune_select_by_soft_nms_workspace(const edgeprune::SoftNmsProblem*) { return 0; }

cudaError_t edgeprune_select_by_soft_nms(const edgeprune::SoftNmsProblem* problem, const float* scores,
                                         const int64_t* num_keep, const uint8_t* droppable,
                                         const void* features, const int64_t* places, const float* nearness,
                                         int64_t* keep_indices, int64_t* keep_count, void*, cudaStream_t) {
  using namespace edgeprune;
  const SoftNmsProblem& p = *problem;
  if (!is_valid(p)) return cudaErrorInvalidValue;
  const int64_t S = p.rows;
  for (int64_t b = 0; b < p.batch; ++b) {
    std::vector<float> score(scores + b * S, scores + (b + 1) * S);
    for (float& value : score) value = std::isnan(value) ? -FLT_MAX : std::clamp(value, -FLT_MAX, FLT_MAX);
    std::vector<bool> keep = text_rows(droppable + b * S, S);
    soft_nms(p, score, num_keep[b], droppable + b * S, unit_rows(features, b * S, p), places + b * S * 2,
             nearness, keep);
    partition(keep, keep_indices + b * S, keep_count + b);
  }
  return cudaSuccess;
}

size_t edgeprune_select_by_dpp_workspace(int32_t, int32_t) { return 0; }

cudaError_t edgeprune_select_by_dpp(int32_t batch, int32_t rows, const float* kernel, const int64_t* num_keep,
                                    const uint8_t* droppable, const int64_t* groups, const int64_t* group_keep,
                                    int64_t* keep_indices, int64_t* keep_count, void*, cudaStream_t) {
  using namespace edgeprune;
  if (!is_selection(batch, rows)) return cudaErrorInvalidValue;
  const int64_t S = rows;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<bool> keep = text_rows(droppable + b * S, S);
    dpp(S, kernel + b * S * S, num_keep[b], droppable + b * S, groups + b * S, group_keep + b * S, keep);
    partition(keep, keep_indices + b * S, keep_count + b);
  }
  return cudaSuccess;
}
