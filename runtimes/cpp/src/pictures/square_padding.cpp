// Pictures padded to a square before they are resized: the preprocessing of LLaVA's own code, expand2square.
#include <algorithm>

#include "error.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

class SquarePadding : public PicturePreprocessing {
 public:
  explicit SquarePadding(const Json& data) : crop_(data["crop"]) {
    const Json& fill = data["fill"];
    const auto is_value = [](const Json& value) {
      return value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() <= 255;
    };
    if (!fill.is_array() || fill.size() != 3 || !std::all_of(fill.begin(), fill.end(), is_value)) {
      throw BundleError("preprocessing fill must be three numbers from 0 to 255, not " + fill.dump());
    }
    for (size_t channel = 0; channel < 3; ++channel) fill_[channel] = fill[channel].get<uint8_t>();
  }

  PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const override {
    std::vector<VisualGrid> grids;
    std::vector<Picture> squares;
    for (const Picture& picture : pictures) {
      crop_.settings().check_mode(picture);
      const int64_t side = std::max(picture.width, picture.height);
      if (side > kMaxPixels / side) {
        throw PictureError("a picture of " + std::to_string(picture.width) + " × " + std::to_string(picture.height) +
                           " pixels is too long to be padded to a square: crop it to a less extreme aspect ratio");
      }
      const int64_t left = (side - picture.width) / 2, top = (side - picture.height) / 2;
      squares.push_back(Picture::filled(side, side, fill_[0], fill_[1], fill_[2]));
      squares.back().paste(picture, left, top);
      std::array<double, 4> box = crop_.box_in_picture(side, side);
      for (size_t edge = 0; edge < 4; ++edge) box[edge] -= static_cast<double>(edge % 2 == 0 ? left : top);
      grids.push_back({static_cast<int64_t>(grids.size()), grid_rows, grid_columns, box});
    }
    return {{{"pixel_values", crop_.pixels(squares)}}, VisualLayout::of_whole_grids(std::move(grids))};
  }

 private:
  CropPreprocessing crop_;
  std::array<uint8_t, 3> fill_{};
};

}  // namespace

std::unique_ptr<PicturePreprocessing> square_padding_from_json(const Json& data) {
  check_setting_names(data, "preprocessing", {"crop", "fill"});
  return std::make_unique<SquarePadding>(data);
}

}  // namespace edgeprune
