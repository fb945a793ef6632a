#include "decoder/host_pruner.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "decoder/tensor_names.h"
#include "error.h"

namespace edgeprune {
namespace {

bool gives_scores(const GraphEntry& graph) {
  return std::any_of(graph.outputs.begin(), graph.outputs.end(),
                     [](const TensorEntry& output) { return output.name == names::kScores; });
}

// Sorted, after every index has been found to be there, and there once.
std::vector<int64_t> checked(std::vector<int64_t> chosen, const SiteScores& site) {
  check_num_kept(site, static_cast<int64_t>(chosen.size()));
  for (const int64_t index : chosen) {
    if (index < 0 || index >= site.num_tokens()) {
      throw PruningError("the pruner keeps the visual token " + std::to_string(index) + " " + site.where() +
                         ": return indices from 0 to " + std::to_string(site.num_tokens() - 1));
    }
  }
  std::sort(chosen.begin(), chosen.end());
  const auto twice = std::adjacent_find(chosen.begin(), chosen.end());
  if (twice != chosen.end()) {
    throw PruningError("the pruner keeps the visual token " + std::to_string(*twice) + " twice " + site.where() +
                       ": return each index once");
  }
  return chosen;
}

}  // namespace

void check_takes_pruner(const Manifest& manifest) {
  bool scored = false;
  for (const SiteEntry& site : manifest.sites) {
    if (scored && site.merged_per_image > 0) {
      throw PruningError(site.graph +
                         " merges tokens and counts on those that the bundle itself leaves before it: open the bundle "
                         "without a pruner");
    }
    scored = scored || gives_scores(manifest.graphs.at(site.graph));
  }
  if (!scored) {
    throw PruningError("no site of this bundle takes a pruner: export it with --method host, or open it without a pruner");
  }
}

void check_num_kept(const SiteScores& site, int64_t count) {
  if (count == 0) throw PruningError("the pruner keeps no visual token " + site.where() + ": return at least one index");
  if (count < 0 || count > site.num_tokens()) {
    throw PruningError("the pruner keeps " + std::to_string(count) + " of " + std::to_string(site.num_tokens()) +
                       " visual tokens " + site.where() + ": return each index once");
  }
}

std::vector<int64_t> highest_scores(const float* scores, int64_t num_tokens, int64_t count) {
  std::vector<int64_t> order(static_cast<size_t>(std::max<int64_t>(0, num_tokens)));
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto higher = [scores](int64_t one, int64_t other) {
    if (std::isnan(scores[one]) || std::isnan(scores[other])) return !std::isnan(scores[one]) && std::isnan(scores[other]);
    return scores[one] > scores[other];
  };
  std::stable_sort(order.begin(), order.end(), higher);
  order.resize(std::min(order.size(), static_cast<size_t>(std::max<int64_t>(1, count))));
  std::sort(order.begin(), order.end());
  return order;
}

std::vector<int64_t> choose_rows(const Pruner& pruner, const SiteEntry& site, const VisualLayout& visual,
                                 const std::vector<float>& scores, const std::vector<int64_t>& visual_slots,
                                 const std::vector<int64_t>& own_rows, double elapsed_ms) {
  const auto num_rows = static_cast<int64_t>(visual_slots.size());
  const auto num_slots = static_cast<int64_t>(visual.places().size());
  const std::vector<int64_t> table = visual.table();
  std::vector<int64_t> rows;
  std::vector<bool> keep(visual_slots.size(), false), own(visual_slots.size(), false);
  bool fits = scores.size() == visual_slots.size();
  for (const int64_t row : own_rows) {
    if (row < 0 || row >= num_rows) fits = false;
    else own[static_cast<size_t>(row)] = true;
  }
  for (const int64_t slot : visual_slots) fits = fits && slot < num_slots;
  if (!fits) throw BackendError("the graph '" + site.graph + "' scores other rows than there are: export the bundle again");

  SiteScores seen;
  seen.name = site.graph;
  seen.place = site.place;
  seen.layer = site.layer;
  seen.elapsed_ms = elapsed_ms;
  for (size_t row = 0; row < visual_slots.size(); ++row) {
    const int64_t slot = visual_slots[row];
    if (slot < 0) {
      keep[row] = true;
      continue;
    }
    if (own[row]) seen.own_choice.push_back(static_cast<int64_t>(rows.size()));
    rows.push_back(static_cast<int64_t>(row));
    seen.scores.push_back(scores[row]);
    seen.slots.push_back(slot);
    const auto place = table.begin() + 5 * slot;
    seen.places.push_back(visual.grids().at(static_cast<size_t>(*place)).image);
    seen.places.insert(seen.places.end(), place, place + 5);
  }
  for (const int64_t index : checked(pruner(seen), seen)) keep[static_cast<size_t>(rows[static_cast<size_t>(index)])] = true;
  std::vector<int64_t> kept;
  for (int64_t row = 0; row < num_rows; ++row) {
    if (keep[static_cast<size_t>(row)]) kept.push_back(row);
  }
  return kept;
}

}  // namespace edgeprune
