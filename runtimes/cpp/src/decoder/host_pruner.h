// A choice of visual tokens by the program that runs a bundle, in the place of the bundle's own; the contract of
// edgeprune/runtimes/host_pruner.py.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "visual_layout.h"

namespace edgeprune {

// The N visual tokens that have reached a site, in the order of the prompt.
struct SiteScores {
  std::string name;   // of the site
  std::string place;  // in words
  int64_t layer = 0;  // that it lies before, or inside of
  std::vector<float> scores;
  std::vector<int64_t> slots;
  std::vector<int64_t> places;      // six numbers each: picture, grid, row, column, rows and columns of that grid
  std::vector<int64_t> own_choice;  // the indices that the bundle itself would keep, ascending
  double elapsed_ms = 0;            // since the answer began

  int64_t num_tokens() const { return static_cast<int64_t>(scores.size()); }
  // For messages: "at site0 (before layer 2)".
  std::string where() const { return "at " + name + " (" + place + ")"; }
};

// Returns the indices of the tokens that stay: at least one, each once, in any order.
using Pruner = std::function<std::vector<int64_t>(const SiteScores& site)>;

// Refuses a bundle in which no pruner could choose, or not without harm. Throws PruningError.
void check_takes_pruner(const Manifest& manifest);

// Refuses numbers of kept tokens that there cannot be. Throws PruningError.
void check_num_kept(const SiteScores& site, int64_t count);

// Indices of the `count` highest scores (at least 1, at most all), ascending; equals go to the lower index, NaN is the
// lowest.
std::vector<int64_t> highest_scores(const float* scores, int64_t num_tokens, int64_t count);

// The rows that a pruner keeps, text included, ascending. `scores` and `visual_slots` are of the rows that have reached
// the site, `own_rows` those that the bundle itself keeps. Throws PruningError: the pruner keeps nothing, or what is not
// there; BackendError: the graph scores other rows than there are; and what the pruner throws.
std::vector<int64_t> choose_rows(const Pruner& pruner, const SiteEntry& site, const VisualLayout& visual,
                                 const std::vector<float>& scores, const std::vector<int64_t>& visual_slots,
                                 const std::vector<int64_t>& own_rows, double elapsed_ms);

}  // namespace edgeprune
