// Visual tokens that leave the KV caches while an answer is generated: the host's part of it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace edgeprune {

struct EvictionEvent {
  int64_t generated;  // tokens
  int64_t left;       // visual tokens
};

// Which rows the caches behind a site still hold, and which a higher rate drops. The rate never falls.
class Eviction {
 public:
  // `visual_ranks` of every row in the caches: 0 the most important, -1 for text.
  Eviction(std::vector<int64_t> visual_ranks, int64_t num_visual, int64_t num_rates);

  // The rows that stay in the caches at this rate, ascending; none if all of them do.
  std::optional<std::vector<int64_t>> rows_to_keep(int64_t rate_index, int64_t cached_rows, int64_t generated);
  const std::vector<EvictionEvent>& events() const { return events_; }

 private:
  std::vector<int64_t> ranks_;
  int64_t num_visual_;
  int64_t num_rates_;
  int64_t left_;
  std::vector<EvictionEvent> events_;
};

}  // namespace edgeprune
