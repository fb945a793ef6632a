// Pictures made ready for a vision tower; a bundle holds as data how its family does it.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bundle/json_object.h"
#include "pictures/picture.h"
#include "pictures/resample.h"
#include "tensor.h"
#include "visual_layout.h"

namespace edgeprune {

struct PreparedPictures {
  TensorMap inputs;  // of the vision graph; floating-point ones are float32
  VisualLayout layout;
};

class PicturePreprocessing {
 public:
  virtual ~PicturePreprocessing() = default;
  // At least one picture; the grid is that of a tile, where tiles have a fixed size. Throws PictureError.
  virtual PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const = 0;
};

// Of the manifest's "preprocessing". Throws BundleError: the kind is unknown, or a setting is unknown, missing or invalid.
std::unique_ptr<PicturePreprocessing> preprocessing_from_json(const Json& data);

// (height, width)
using PixelSize = std::array<int64_t, 2>;

// The settings that every kind has: how 8-bit pixels become the tower's numbers.
class PixelSettings {
 public:
  // Throws BundleError.
  explicit PixelSettings(const Json& data);

  Resampling resample() const { return resample_; }
  // Throws PictureError: it is not RGB and must be.
  void check_mode(const Picture& picture) const;
  // The number of an 8-bit value in a channel: (value · factor − mean) / std.
  const std::array<float, 256>& numbers(size_t channel) const { return numbers_[channel]; }
  // [3, height, width] of a picture.
  void write(const Picture& picture, float* target) const;

 private:
  Resampling resample_ = Resampling::bicubic;
  bool convert_rgb_ = true;
  std::array<std::array<float, 256>, 3> numbers_{};
};

// Throws BundleError with every field that is unknown or missing.
void check_setting_names(const Json& data, const std::string& what, const std::vector<const char*>& names);
// A positive integer of the settings. Throws BundleError.
int64_t positive_setting(const Json& data, const char* name, int64_t least = 1);
// A height and width; both positive and their product within kMaxPixels.
bool is_pixel_size(const Json& value);

// One kind of preprocessing, "crop", and a part of others: resize, cut from the middle, normalize.
class CropPreprocessing : public PicturePreprocessing {
 public:
  explicit CropPreprocessing(const Json& data);

  PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const override;

  // pixel_values [pictures, 3, height, width].
  Tensor pixels(const std::vector<Picture>& pictures) const;
  PixelSize input_size() const { return center_crop_[0] > 0 ? center_crop_ : resize_to_; }
  bool has_fixed_size() const { return resize_to_[0] > 0; }
  bool is_cropped() const { return center_crop_[0] > 0; }
  const PixelSettings& settings() const { return settings_; }
  std::array<double, 4> box_in_picture(int64_t width, int64_t height) const;

 private:
  PixelSize resized_size(int64_t width, int64_t height) const;
  Picture cropped(const Picture& picture) const;

  int64_t shortest_edge_ = 0;  // 0 where resize_to is given
  PixelSize resize_to_{};      // zeros where it is not
  PixelSize center_crop_{};    // zeros where nothing is cut
  PixelSettings settings_;
};

std::unique_ptr<PicturePreprocessing> square_padding_from_json(const Json& data);
std::unique_ptr<PicturePreprocessing> anyres_from_json(const Json& data);
std::unique_ptr<PicturePreprocessing> tiling_from_json(const Json& data);
std::unique_ptr<PicturePreprocessing> flat_patches_from_json(const Json& data);

}  // namespace edgeprune
