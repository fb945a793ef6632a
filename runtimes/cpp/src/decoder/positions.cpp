#include "decoder/positions.h"

#include <algorithm>

#include "error.h"

namespace edgeprune {

std::vector<int64_t> prompt_positions(int64_t axes, const std::vector<int64_t>& token_ids, int64_t image_token_id,
                                      const VisualLayout* visual) {
  const size_t num_rows = token_ids.size();
  std::vector<int64_t> positions(static_cast<size_t>(axes) * num_rows);
  if (axes == 1 || visual == nullptr) {
    for (size_t index = 0; index < positions.size(); ++index) positions[index] = static_cast<int64_t>(index % num_rows);
    return positions;
  }
  const auto num_visual = std::count(token_ids.begin(), token_ids.end(), image_token_id);
  if (static_cast<size_t>(num_visual) != visual->slots().size()) {
    throw PromptError("the prompt holds " + std::to_string(num_visual) + " visual tokens, its pictures " +
                      std::to_string(visual->slots().size()) + ": expand each picture's placeholder to its visual tokens");
  }
  const auto put = [&](size_t row, int64_t time, int64_t height, int64_t width) {
    positions[row] = time, positions[num_rows + row] = height, positions[2 * num_rows + row] = width;
  };
  size_t row = 0, slot = 0;
  int64_t start = 0;
  const auto place_of = [&](size_t index) { return visual->places()[static_cast<size_t>(visual->slots()[index])]; };
  for (size_t index = 0; index < visual->grids().size(); ++index) {
    const VisualGrid& grid = visual->grids()[index];
    for (; row < num_rows && token_ids[row] != image_token_id; ++row, ++start) put(row, start, start, start);
    for (; slot < visual->slots().size() && place_of(slot).grid == static_cast<int64_t>(index); ++slot, ++row) {
      put(row, start, start + place_of(slot).row, start + place_of(slot).column);
    }
    start += std::max(grid.rows, grid.columns);
  }
  for (; row < num_rows; ++row, ++start) put(row, start, start, start);
  return positions;
}

std::vector<Numbering> segment_numberings(const std::vector<SiteEntry>& sites) {
  std::vector<Numbering> numberings = {Numbering::original};
  for (const SiteEntry& site : sites) {
    numberings.push_back(site.positions == Numbering::original ? numberings.back() : site.positions);
  }
  return numberings;
}

}  // namespace edgeprune
