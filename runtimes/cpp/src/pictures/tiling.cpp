// Pictures cut into tiles of one size, and seen as a whole beside them: InternVL's preprocessing.
#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

constexpr int64_t kMostTiles = 4096;

class Tiling : public PicturePreprocessing {
 public:
  explicit Tiling(const Json& data) : tile_(data["tile"]) {
    if (!tile_.has_fixed_size() || tile_.is_cropped()) {
      throw BundleError("preprocessing tile must have resize_to and no center_crop");
    }
    for (const char* name : {"min_tiles", "max_tiles"}) {
      const Json& value = data[name];
      if (!value.is_number_integer() || value.get<int64_t>() < 1 || value.get<int64_t>() > kMostTiles) {
        throw BundleError(std::string("preprocessing ") + name + " must be a positive integer, not " + value.dump());
      }
    }
    min_tiles_ = data["min_tiles"].get<int64_t>();
    max_tiles_ = data["max_tiles"].get<int64_t>();
    if (min_tiles_ > max_tiles_) {
      throw BundleError("preprocessing min_tiles must be at most max_tiles, " + std::to_string(max_tiles_) + ", not " +
                        std::to_string(min_tiles_));
    }
    const auto [height, width] = tile_.input_size();
    if (max_tiles_ > kMaxPixels / (height * width)) {
      throw BundleError("preprocessing max_tiles " + std::to_string(max_tiles_) + " of " + std::to_string(height) + " × " +
                        std::to_string(width) + " are more than " + std::to_string(kMaxPixels) + " pixels");
    }
    for (int64_t columns = 1; columns <= max_tiles_; ++columns) {
      for (int64_t rows = 1; rows <= max_tiles_ / columns; ++rows) {
        if (columns * rows >= min_tiles_) candidates_.push_back({rows, columns});
      }
    }
    // Of equally many tiles, the fewest columns first: the order decides between equally near ones.
    std::stable_sort(candidates_.begin(), candidates_.end(),
                     [](const Tiles& a, const Tiles& b) { return a.rows * a.columns < b.rows * b.columns; });
  }

  PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const override {
    const auto [tile_height, tile_width] = tile_.input_size();
    std::vector<Picture> tiles;
    std::vector<VisualGrid> grids;
    for (size_t index = 0; index < pictures.size(); ++index) {
      const Picture& picture = pictures[index];
      const auto image = static_cast<int64_t>(index);
      const auto width = static_cast<double>(picture.width), height = static_cast<double>(picture.height);
      tile_.settings().check_mode(picture);
      const auto [rows, columns] = tiles_of(picture.width, picture.height);
      const bool whole = rows * columns == 1;
      Picture stretched;
      if (!whole) stretched = resized(picture, columns * tile_width, rows * tile_height, tile_.settings().resample());
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t column = 0; column < columns; ++column) {
          const auto edge = [](int64_t part, double size, int64_t parts) {
            return static_cast<double>(part) * size / static_cast<double>(parts);
          };
          grids.push_back({image, grid_rows, grid_columns,
                           {edge(column, width, columns), edge(row, height, rows), edge(column + 1, width, columns),
                            edge(row + 1, height, rows)}});
          if (!whole) tiles.push_back(stretched.cut(column * tile_width, row * tile_height, tile_width, tile_height));
        }
      }
      tiles.push_back(picture);
      if (!whole) grids.push_back({image, grid_rows, grid_columns, {0, 0, width, height}, true});
    }
    return {{{"pixel_values", tile_.pixels(tiles)}}, VisualLayout::of_whole_grids(std::move(grids))};
  }

 private:
  struct Tiles {
    int64_t rows, columns;
  };

  // The aspect ratio that is the nearest to the picture's. Of equally near ones the smallest is taken, unless the
  // picture has more than half of the pixels of a larger one.
  Tiles tiles_of(int64_t width, int64_t height) const {
    const auto [tile_height, tile_width] = tile_.input_size();
    Tiles best{1, 1};
    double best_distance = std::numeric_limits<double>::infinity();
    for (const Tiles& tiles : candidates_) {
      const double distance = std::fabs(static_cast<double>(width) / static_cast<double>(height) -
                                        static_cast<double>(tiles.columns) / static_cast<double>(tiles.rows));
      const bool fills = static_cast<double>(width * height) >
                         0.5 * static_cast<double>(tile_height) * static_cast<double>(tile_width) *
                             static_cast<double>(tiles.columns) * static_cast<double>(tiles.rows);
      if (distance < best_distance || (distance == best_distance && fills)) best = tiles, best_distance = distance;
    }
    return best;
  }

  CropPreprocessing tile_;
  int64_t min_tiles_ = 1, max_tiles_ = 1;
  std::vector<Tiles> candidates_;
};

}  // namespace

std::unique_ptr<PicturePreprocessing> tiling_from_json(const Json& data) {
  check_setting_names(data, "preprocessing", {"tile", "min_tiles", "max_tiles"});
  return std::make_unique<Tiling>(data);
}

}  // namespace edgeprune
