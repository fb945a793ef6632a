// Where the visual tokens of a prompt come from and where they stand, before anything is pruned.
//
// A slot is the identity of a visual token all the way through the model. The first slots are the outputs of the vision
// tower, tile after tile; slots behind them belong to rows that a family inserts, as LLaVA-NeXT its newlines.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace edgeprune {

// A rectangle of visual tokens: a picture, a tile of one, or several tiles joined.
struct VisualGrid {
  int64_t image = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  std::array<double, 4> box{};  // left, top, right, bottom of what it shows, in pixels of the picture
  bool overview = false;
};

// Which rows of the tower's output enter the decoder, in which order.
struct FeatureRows {
  std::vector<int64_t> rows;  // -1 - slot for an inserted row
  std::vector<int64_t> tokens_per_image;
};

struct VisualPlace {
  int64_t grid;  // -1 where the tower sees only padding
  int64_t row;
  int64_t column;
};

class VisualLayout {
 public:
  VisualLayout(std::vector<VisualGrid> grids, std::vector<VisualPlace> places, std::vector<int64_t> slots,
               int64_t inserted);
  // Pictures whose grids hold every output of the tower, row by row, and nothing else.
  static VisualLayout of_whole_grids(std::vector<VisualGrid> grids);

  const std::vector<VisualGrid>& grids() const { return grids_; }
  const std::vector<VisualPlace>& places() const { return places_; }   // by slot
  const std::vector<int64_t>& slots() const { return slots_; }         // in the order of the prompt
  int64_t num_images() const;
  const std::vector<int64_t>& tokens_per_image() const { return tokens_per_image_; }
  // By slot, five numbers: grid, row, column, rows and columns of that grid; zeros where nothing is.
  std::vector<int64_t> table() const;

  // The rows that enter the decoder, if they are known before the tower has run.
  std::optional<FeatureRows> rows_beforehand(std::optional<int64_t> tokens_per_tile, int64_t tile_size) const;
  // The same from what has left a tower that drops tokens; `counts` (of a tile's rows how many are tokens) may be null.
  // Throws BackendError: the tower gave what no layout has.
  FeatureRows rows_of(const std::vector<int64_t>& patch_slots, const std::vector<int64_t>* counts) const;
  // Divides a number for each picture among its grids, by the tokens that they show.
  std::vector<int64_t> split_over_grids(const std::vector<int64_t>& per_image) const;

 private:
  bool is_plain() const;
  std::vector<int64_t> count_by_image(const std::vector<int64_t>& slots) const;

  std::vector<VisualGrid> grids_;
  std::vector<VisualPlace> places_;
  std::vector<int64_t> slots_;
  int64_t inserted_;
  std::vector<int64_t> tokens_per_image_;
};

}  // namespace edgeprune
