#include "decoder/eviction.h"

#include <algorithm>

#include "numbers.h"

namespace edgeprune {

Eviction::Eviction(std::vector<int64_t> visual_ranks, int64_t num_visual, int64_t num_rates)
    : ranks_(std::move(visual_ranks)), num_visual_(num_visual), num_rates_(num_rates) {
  left_ = std::count_if(ranks_.begin(), ranks_.end(), [](int64_t rank) { return rank >= 0; });
}

std::optional<std::vector<int64_t>> Eviction::rows_to_keep(int64_t rate_index, int64_t cached_rows, int64_t generated) {
  // DyRate, Eq. 1: the share k/R is removed.
  const int64_t left = num_visual_ - floor_divided(num_visual_ * rate_index, num_rates_);
  if (left >= left_) return std::nullopt;
  // Rows that are new since the prefill are text.
  ranks_.resize(static_cast<size_t>(cached_rows), -1);
  std::vector<int64_t> rows, ranks;
  for (size_t row = 0; row < ranks_.size(); ++row) {
    if (ranks_[row] >= left) continue;
    rows.push_back(static_cast<int64_t>(row));
    ranks.push_back(ranks_[row]);
  }
  ranks_ = std::move(ranks);
  left_ = left;
  events_.push_back({generated, left});
  return rows;
}

}  // namespace edgeprune
