// Pictures of any size as one row of flattened patches, as Qwen2-VL's tower reads them.
#include <algorithm>
#include <cmath>

#include "error.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

// Qwen2-VL was not trained on longer strips.
constexpr int64_t kMaxAspectRatio = 200;

// Rows of indices with -1 behind each one's last.
Tensor padded_rows(const std::vector<std::vector<int64_t>>& groups, int64_t length) {
  std::vector<int64_t> rows;
  for (const std::vector<int64_t>& group : groups) {
    rows.insert(rows.end(), group.begin(), group.end());
    rows.insert(rows.end(), static_cast<size_t>(length) - group.size(), -1);
  }
  return int64_tensor(rows, {static_cast<int64_t>(groups.size()), length});
}

class FlatPatches : public PicturePreprocessing {
 public:
  explicit FlatPatches(const Json& data)
      : min_pixels_(positive_setting(data, "min_pixels")),
        max_pixels_(positive_setting(data, "max_pixels")),
        patch_size_(positive_setting(data, "patch_size")),
        temporal_patch_size_(positive_setting(data, "temporal_patch_size")),
        merge_size_(positive_setting(data, "merge_size")),
        window_tokens_(positive_setting(data, "window_tokens", 0)),
        settings_(data) {
    const bool usable = patch_size_ <= 4096 && merge_size_ <= 4096 && temporal_patch_size_ <= 64 && window_tokens_ <= 4096;
    if (!usable || factor() * factor() > max_pixels_ || min_pixels_ > max_pixels_) {
      throw BundleError("preprocessing min_pixels " + std::to_string(min_pixels_) + " and max_pixels " +
                        std::to_string(max_pixels_) + " must be in order, max_pixels between " +
                        std::to_string(factor() * factor()) + " (one visual token) and " + std::to_string(kMaxPixels));
    }
  }

  PreparedPictures prepare(const std::vector<Picture>& pictures, int64_t, int64_t) const override {
    std::vector<PixelSize> grids;  // patches of each picture
    std::vector<VisualGrid> visual;
    std::vector<int64_t> positions;
    std::vector<std::vector<int64_t>> picture_rows;
    int64_t num_patches = 0, longest = 0;
    for (const Picture& picture : pictures) {
      const auto [height, width] = resized_size(picture.width, picture.height);
      grids.push_back({height / patch_size_, width / patch_size_});
      const int64_t count = grids.back()[0] * grids.back()[1];
      std::vector<int64_t> rows;
      for (int64_t row = 0; row < count; ++row) rows.push_back(num_patches + row);
      picture_rows.push_back(std::move(rows));
      num_patches += count;
      longest = std::max(longest, count);
      visual.push_back({static_cast<int64_t>(visual.size()), grids.back()[0] / merge_size_, grids.back()[1] / merge_size_,
                        {0, 0, static_cast<double>(picture.width), static_cast<double>(picture.height)}});
    }
    const int64_t values = 3 * temporal_patch_size_ * patch_size_ * patch_size_;
    Tensor pixels = host_tensor({num_patches, values}, DataType::float32);
    float* target = pixels.data<float>();
    for (size_t index = 0; index < pictures.size(); ++index) {
      settings_.check_mode(pictures[index]);
      target = write_patches(resized(pictures[index], grids[index][1] * patch_size_, grids[index][0] * patch_size_, settings_.resample()), target);
      each_patch(grids[index], [&](int64_t row, int64_t column) { positions.insert(positions.end(), {row, column}); });
    }
    TensorMap inputs = {{"pixel_values", pixels},
                        {"patch_positions", int64_tensor(positions, {num_patches, 2})},
                        {"picture_rows", padded_rows(picture_rows, longest)}};
    if (window_tokens_ > 0) inputs["window_rows"] = window_rows(grids);
    return {std::move(inputs), VisualLayout::of_whole_grids(std::move(visual))};
  }

 private:
  // Side of a visual token in pixels.
  int64_t factor() const { return patch_size_ * merge_size_; }

  PixelSize resized_size(int64_t width, int64_t height) const {
    if (std::max(height, width) > kMaxAspectRatio * std::min(height, width)) {
      throw PictureError("a picture of " + std::to_string(width) + " × " + std::to_string(height) + " pixels is longer than " +
                         std::to_string(kMaxAspectRatio) + " times its width: crop it to a less extreme aspect ratio");
    }
    const auto side = static_cast<double>(factor());
    const auto h = static_cast<double>(height), w = static_cast<double>(width);
    const auto sides = [&](double count) { return static_cast<int64_t>(count) * factor(); };
    // Halves go to even, as in Python.
    const PixelSize near = {sides(std::nearbyint(h / side)), sides(std::nearbyint(w / side))};
    if (near[0] > 0 && near[1] > max_pixels_ / near[0]) {
      const double shrink = std::sqrt(h * w / static_cast<double>(max_pixels_));
      return {std::max(factor(), sides(std::floor(h / shrink / side))), std::max(factor(), sides(std::floor(w / shrink / side)))};
    }
    if (near[0] * near[1] < min_pixels_) {
      const double grow = std::sqrt(static_cast<double>(min_pixels_) / (h * w));
      return {sides(std::ceil(h * grow / side)), sides(std::ceil(w * grow / side))};
    }
    return near;
  }

  // Block by block, a block's patches row by row.
  template <typename Visit>
  void each_patch(const PixelSize& grid, Visit visit) const {
    for (int64_t top = 0; top < grid[0]; top += merge_size_) {
      for (int64_t left = 0; left < grid[1]; left += merge_size_) {
        for (int64_t row = top; row < top + merge_size_; ++row) {
          for (int64_t column = left; column < left + merge_size_; ++column) visit(row, column);
        }
      }
    }
  }

  // Channel, frame, pixel row, pixel column of every patch.
  float* write_patches(const Picture& picture, float* target) const {
    each_patch({picture.height / patch_size_, picture.width / patch_size_}, [&](int64_t row, int64_t column) {
      for (size_t channel = 0; channel < 3; ++channel) {
        const std::array<float, 256>& numbers = settings_.numbers(channel);
        for (int64_t frame = 0; frame < temporal_patch_size_; ++frame) {
          for (int64_t y = row * patch_size_; y < (row + 1) * patch_size_; ++y) {
            const uint8_t* source = picture.row(y) + 3 * column * patch_size_ + channel;
            for (int64_t x = 0; x < patch_size_; ++x) *target++ = numbers[source[3 * x]];
          }
        }
      }
    });
    return target;
  }

  // Windows at the right and bottom edge may hold fewer patches.
  Tensor window_rows(const std::vector<PixelSize>& grids) const {
    const int64_t per_token = merge_size_ * merge_size_;
    std::vector<std::vector<int64_t>> windows;
    int64_t first = 0;
    for (const auto& [patch_rows, patch_columns] : grids) {
      const int64_t rows = patch_rows / merge_size_, columns = patch_columns / merge_size_;
      for (int64_t top = 0; top < rows; top += window_tokens_) {
        for (int64_t left = 0; left < columns; left += window_tokens_) {
          std::vector<int64_t> window;
          for (int64_t row = top; row < std::min(rows, top + window_tokens_); ++row) {
            for (int64_t column = left; column < std::min(columns, left + window_tokens_); ++column) {
              const int64_t start = first + (row * columns + column) * per_token;
              for (int64_t patch = 0; patch < per_token; ++patch) window.push_back(start + patch);
            }
          }
          windows.push_back(std::move(window));
        }
      }
      first += patch_rows * patch_columns;
    }
    return padded_rows(windows, window_tokens_ * window_tokens_ * per_token);
  }

  int64_t min_pixels_, max_pixels_, patch_size_, temporal_patch_size_, merge_size_, window_tokens_;
  PixelSettings settings_;
};

}  // namespace

std::unique_ptr<PicturePreprocessing> flat_patches_from_json(const Json& data) {
  check_setting_names(data, "preprocessing",
                      {"min_pixels", "max_pixels", "patch_size", "temporal_patch_size", "merge_size", "window_tokens", "resample",
                       "rescale_factor", "mean", "std", "convert_rgb"});
  return std::make_unique<FlatPatches>(data);
}

}  // namespace edgeprune
