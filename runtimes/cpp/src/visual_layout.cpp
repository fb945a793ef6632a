#include "visual_layout.h"

#include <algorithm>
#include <numeric>

#include "error.h"
#include "numbers.h"

namespace edgeprune {
namespace {

size_t place_of(int64_t index) { return static_cast<size_t>(index); }

}  // namespace

VisualLayout::VisualLayout(std::vector<VisualGrid> grids, std::vector<VisualPlace> places, std::vector<int64_t> slots,
                           int64_t inserted)
    : grids_(std::move(grids)), places_(std::move(places)), slots_(std::move(slots)), inserted_(inserted) {
  tokens_per_image_ = count_by_image(slots_);
}

VisualLayout VisualLayout::of_whole_grids(std::vector<VisualGrid> grids) {
  std::vector<VisualPlace> places;
  for (size_t index = 0; index < grids.size(); ++index) {
    for (int64_t row = 0; row < grids[index].rows; ++row) {
      for (int64_t column = 0; column < grids[index].columns; ++column) {
        places.push_back({static_cast<int64_t>(index), row, column});
      }
    }
  }
  std::vector<int64_t> slots = counted(static_cast<int64_t>(places.size()));
  return {std::move(grids), std::move(places), std::move(slots), 0};
}

int64_t VisualLayout::num_images() const {
  int64_t last = -1;
  for (const VisualGrid& grid : grids_) last = std::max(last, grid.image);
  return 1 + last;
}

std::vector<int64_t> VisualLayout::table() const {
  std::vector<int64_t> table;
  table.reserve(5 * places_.size());
  for (const VisualPlace& place : places_) {
    if (place.grid < 0) {
      table.insert(table.end(), 5, 0);
    } else {
      const VisualGrid& grid = grids_[place_of(place.grid)];
      table.insert(table.end(), {place.grid, place.row, place.column, grid.rows, grid.columns});
    }
  }
  return table;
}

std::optional<FeatureRows> VisualLayout::rows_beforehand(std::optional<int64_t> tokens_per_tile, int64_t tile_size) const {
  const int64_t num_tower = static_cast<int64_t>(places_.size()) - inserted_;
  FeatureRows found;
  if (!tokens_per_tile) {
    for (const int64_t slot : slots_) found.rows.push_back(slot >= num_tower ? -1 - slot : slot);
    found.tokens_per_image = tokens_per_image_;
    return found;
  }
  if (!is_plain()) return std::nullopt;
  // Rows of a tile stand together, and tiles in the order of the prompt.
  found.tokens_per_image.assign(place_of(num_images()), 0);
  int64_t tiles = 0;
  for (int64_t slot = 0; slot < num_tower; slot += tile_size, ++tiles) {
    found.tokens_per_image[place_of(grids_[place_of(places_[place_of(slot)].grid)].image)] += *tokens_per_tile;
  }
  found.rows = counted(tiles * *tokens_per_tile);
  return found;
}

FeatureRows VisualLayout::rows_of(const std::vector<int64_t>& patch_slots, const std::vector<int64_t>* counts) const {
  const auto num_rows = static_cast<int64_t>(patch_slots.size());
  for (const int64_t slot : patch_slots) {
    if (slot < 0 || slot >= static_cast<int64_t>(places_.size())) {
      throw BackendError("the vision tower names a visual token that there is none of: export the bundle again");
    }
  }
  std::vector<int64_t> rows;
  if (counts == nullptr) {
    rows = counted(num_rows);
  } else {
    if (counts->empty() || num_rows % static_cast<int64_t>(counts->size()) != 0) {
      throw BackendError("the vision tower counts the tokens of other tiles than it gives: export the bundle again");
    }
    const int64_t per_tile = num_rows / static_cast<int64_t>(counts->size());
    for (size_t tile = 0; tile < counts->size(); ++tile) {
      const int64_t first = static_cast<int64_t>(tile) * per_tile;
      for (int64_t row = 0; row < std::min((*counts)[tile], per_tile); ++row) rows.push_back(first + row);
    }
  }
  FeatureRows found;
  std::vector<int64_t> slots;
  if (is_plain()) {
    for (const int64_t row : rows) slots.push_back(patch_slots[place_of(row)]);
    return {std::move(rows), count_by_image(slots)};
  }
  std::vector<int64_t> order(places_.size(), -1);
  for (size_t index = 0; index < slots_.size(); ++index) order[place_of(slots_[index])] = static_cast<int64_t>(index);
  struct Entry {
    int64_t order, row;
  };
  std::vector<Entry> entries;
  const auto add = [&](int64_t slot, int64_t row) {
    entries.push_back({order[place_of(slot)], row});
    slots.push_back(slot);
  };
  for (const int64_t row : rows) {
    if (order[place_of(patch_slots[place_of(row)])] >= 0) add(patch_slots[place_of(row)], row);
  }
  const auto num_places = static_cast<int64_t>(places_.size());
  for (int64_t slot = num_places - inserted_; slot < num_places; ++slot) add(slot, -1 - slot);
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.order < b.order; });
  for (const Entry& entry : entries) found.rows.push_back(entry.row);
  found.tokens_per_image = count_by_image(slots);
  return found;
}

std::vector<int64_t> VisualLayout::split_over_grids(const std::vector<int64_t>& per_image) const {
  std::vector<int64_t> of_grid(grids_.size(), 0), parts(grids_.size(), 0);
  for (const int64_t slot : slots_) ++of_grid[place_of(places_[place_of(slot)].grid)];
  for (size_t image = 0; image < per_image.size(); ++image) {
    int64_t all = 0, before = 0, end = 0;
    const auto is_own = [&](size_t grid) { return grids_[grid].image == static_cast<int64_t>(image); };
    for (size_t grid = 0; grid < grids_.size(); ++grid) all += is_own(grid) ? of_grid[grid] : 0;
    int64_t seen = 0;
    for (size_t grid = 0; grid < grids_.size(); ++grid) {
      if (!is_own(grid)) continue;
      seen += of_grid[grid];
      end = seen * per_image[image] / std::max<int64_t>(1, all);
      parts[grid] = end - before;
      before = end;
    }
  }
  return parts;
}

bool VisualLayout::is_plain() const {
  if (inserted_ != 0 || slots_.size() != places_.size()) return false;
  for (size_t index = 0; index < slots_.size(); ++index) {
    if (slots_[index] != static_cast<int64_t>(index)) return false;
  }
  return true;
}

std::vector<int64_t> VisualLayout::count_by_image(const std::vector<int64_t>& slots) const {
  std::vector<int64_t> counts(place_of(num_images()), 0);
  for (const int64_t slot : slots) {
    const int64_t grid = places_[place_of(slot)].grid;
    if (grid >= 0) ++counts[place_of(grids_[place_of(grid)].image)];
  }
  return counts;
}

}  // namespace edgeprune
