// Pictures of any resolution as tiles of one size: LLaVA-NeXT's preprocessing.
//
// A picture is seen twice: stretched to one tile, and scaled to fit the best of the given resolutions, padded with black
// and cut into tiles. The tiles' tokens stand in one joined grid; its rows and columns that show only padding are left
// out, and each of its rows ends with a newline token.
#include <algorithm>
#include <cmath>
#include <utility>

#include "error.h"
#include "numbers.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

double ratio(int64_t a, int64_t b) { return static_cast<double>(a) / static_cast<double>(b); }

// Where a scaled picture lies in the resolution that it was padded to.
struct Padded {
  int64_t top, left, scaled_height, scaled_width;
};

// An odd rest of the padding goes to the bottom and right.
Padded fit(int64_t width, int64_t height, const PixelSize& resolution) {
  const auto [target_height, target_width] = resolution;
  const double scale_x = ratio(target_width, width), scale_y = ratio(target_height, height);
  int64_t scaled_width = target_width, scaled_height = target_height;
  if (scale_x < scale_y) {
    scaled_height = std::min(static_cast<int64_t>(std::ceil(static_cast<double>(height) * scale_x)), target_height);
  } else {
    scaled_width = std::min(static_cast<int64_t>(std::ceil(static_cast<double>(width) * scale_y)), target_width);
  }
  return {(target_height - scaled_height) / 2, (target_width - scaled_width) / 2, scaled_height, scaled_width};
}

// The part of a joined grid that shows the picture, newlines not counted.
struct Unpadded {
  int64_t top, left, rows, columns;
};

Unpadded unpad(int64_t width, int64_t height, int64_t rows, int64_t columns) {
  if (ratio(width, height) > ratio(columns, rows)) {
    const auto shown = static_cast<int64_t>(rounded_to(static_cast<double>(height) * ratio(columns, width), 7));
    const int64_t top = (rows - shown) / 2;
    return {top, 0, rows - 2 * top, columns};
  }
  const auto shown = static_cast<int64_t>(rounded_to(static_cast<double>(width) * ratio(rows, height), 7));
  const int64_t left = (columns - shown) / 2;
  return {0, left, rows, columns - 2 * left};
}

class Anyres : public PicturePreprocessing {
 public:
  explicit Anyres(const Json& data) : tile_(data["tile"]) {
    if (!tile_.has_fixed_size() || tile_.is_cropped() || tile_.input_size()[0] != tile_.input_size()[1]) {
      throw BundleError("preprocessing tile must have a square resize_to and no center_crop");
    }
    side_ = tile_.input_size()[0];
    const Json& pinpoints = data["pinpoints"];
    if (!pinpoints.is_array() || pinpoints.empty()) {
      throw BundleError("preprocessing pinpoints must be a list of sizes, not " + pinpoints.dump());
    }
    for (const Json& pinpoint : pinpoints) {
      const bool usable = is_pixel_size(pinpoint);
      if (!usable || pinpoint[0].get<int64_t>() % side_ != 0 || pinpoint[1].get<int64_t>() % side_ != 0) {
        throw BundleError("preprocessing pinpoint must be a height and width, multiples of " + std::to_string(side_) +
                          ", not " + pinpoint.dump());
      }
      pinpoints_.push_back({pinpoint[0].get<int64_t>(), pinpoint[1].get<int64_t>()});
    }
  }

  PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const override {
    std::vector<Picture> tiles;
    for (const Picture& picture : pictures) add_tiles(picture, tiles);
    return {{{"pixel_values", tile_.pixels(tiles)}}, layout(pictures, grid_rows, grid_columns)};
  }

 private:
  // The resolution that keeps most of a picture, the smallest of those; the first of equal ones.
  PixelSize best_resolution(int64_t width, int64_t height) const {
    const auto rank = [&](const PixelSize& target) {
      const double scale = std::min(ratio(target[1], width), ratio(target[0], height));
      const int64_t effective = std::min(static_cast<int64_t>(static_cast<double>(width) * scale) *
                                             static_cast<int64_t>(static_cast<double>(height) * scale),
                                         width * height);
      return std::make_pair(effective, effective - target[0] * target[1]);
    };
    return *std::max_element(pinpoints_.begin(), pinpoints_.end(),
                             [&](const PixelSize& a, const PixelSize& b) { return rank(a) < rank(b); });
  }

  // The picture as a whole, then the tiles of its best resolution, row by row.
  void add_tiles(const Picture& picture, std::vector<Picture>& tiles) const {
    tile_.settings().check_mode(picture);
    const PixelSize resolution = best_resolution(picture.width, picture.height);
    const Padded padded = fit(picture.width, picture.height, resolution);
    Picture canvas = Picture::filled(resolution[1], resolution[0], 0, 0, 0);
    canvas.paste(resized(picture, padded.scaled_width, padded.scaled_height, tile_.settings().resample()), padded.left, padded.top);
    tiles.push_back(picture);
    for (int64_t top = 0; top < resolution[0]; top += side_) {
      for (int64_t left = 0; left < resolution[1]; left += side_) tiles.push_back(canvas.cut(left, top, side_, side_));
    }
  }

  VisualLayout layout(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const {
    const int64_t per_tile = grid_rows * grid_columns;
    std::vector<VisualGrid> grids;
    std::vector<VisualPlace> places, newlines;
    std::vector<int64_t> order;
    // Newlines get the slots behind those of all tiles.
    int64_t next_newline = 0;
    for (const Picture& picture : pictures) {
      const PixelSize pinpoint = best_resolution(picture.width, picture.height);
      next_newline += per_tile * (1 + pinpoint[0] * pinpoint[1] / (side_ * side_));
    }
    for (size_t index = 0; index < pictures.size(); ++index) {
      const auto image = static_cast<int64_t>(index);
      const int64_t width = pictures[index].width, height = pictures[index].height;
      const PixelSize pinpoint = best_resolution(width, height);
      const std::array<double, 4> whole{0, 0, static_cast<double>(width), static_cast<double>(height)};
      const auto base = static_cast<int64_t>(grids.size());
      grids.push_back({image, grid_rows, grid_columns, whole, true});
      for (int64_t row = 0; row < grid_rows; ++row) {
        for (int64_t column = 0; column < grid_columns; ++column) {
          order.push_back(static_cast<int64_t>(places.size()));
          places.push_back({base, row, column});
        }
      }
      const auto first = static_cast<int64_t>(places.size());
      const int64_t tile_columns = pinpoint[1] / side_;
      const int64_t rows = pinpoint[0] / side_ * grid_rows, columns = tile_columns * grid_columns;
      // Slots run through a tile before the next one begins.
      const auto slot_of = [&](int64_t row, int64_t column) {
        const int64_t tile = row / grid_rows * tile_columns + column / grid_columns;
        return first + tile * per_tile + row % grid_rows * grid_columns + column % grid_columns;
      };
      places.resize(places.size() + static_cast<size_t>(rows * columns), VisualPlace{-1, 0, 0});
      const Unpadded seen = unpad(width, height, rows, columns);
      // A thin picture may leave no row, or no column but that of the newlines.
      if (seen.rows <= 0) continue;
      const auto joined = static_cast<int64_t>(grids.size());
      grids.push_back({image, seen.rows, seen.columns + 1, box(width, height, pinpoint, grid_rows, grid_columns, seen)});
      for (int64_t row = 0; row < seen.rows; ++row) {
        for (int64_t column = 0; column < seen.columns; ++column) {
          const int64_t slot = slot_of(seen.top + row, seen.left + column);
          places[static_cast<size_t>(slot)] = {joined, row, column};
          order.push_back(slot);
        }
        newlines.push_back({joined, row, seen.columns});
        order.push_back(next_newline++);
      }
    }
    places.insert(places.end(), newlines.begin(), newlines.end());
    return {std::move(grids), std::move(places), std::move(order), static_cast<int64_t>(newlines.size())};
  }

  // Where the joined grid lies in the picture; its last column, the newlines, on the right of it.
  std::array<double, 4> box(int64_t width, int64_t height, const PixelSize& pinpoint, int64_t grid_rows,
                            int64_t grid_columns, const Unpadded& seen) const {
    const Padded padded = fit(width, height, pinpoint);
    const double cell_height = ratio(side_, grid_rows), cell_width = ratio(side_, grid_columns);
    const double scale_x = ratio(width, padded.scaled_width), scale_y = ratio(height, padded.scaled_height);
    const double left = (static_cast<double>(seen.left) * cell_width - static_cast<double>(padded.left)) * scale_x;
    const double top = (static_cast<double>(seen.top) * cell_height - static_cast<double>(padded.top)) * scale_y;
    return {left, top, left + static_cast<double>(seen.columns + 1) * cell_width * scale_x,
            top + static_cast<double>(seen.rows) * cell_height * scale_y};
  }

  CropPreprocessing tile_;
  int64_t side_ = 0;
  std::vector<PixelSize> pinpoints_;
};

}  // namespace

std::unique_ptr<PicturePreprocessing> anyres_from_json(const Json& data) {
  check_setting_names(data, "preprocessing", {"tile", "pinpoints"});
  return std::make_unique<Anyres>(data);
}

}  // namespace edgeprune
