// Resize, cut from the middle, normalize: the steps and their rounding are those of transformers' CLIPImageProcessor.
#include <algorithm>

#include "error.h"
#include "numbers.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

const Json& checked(const Json& data) {
  check_setting_names(data, "preprocessing", {"shortest_edge", "resize_to", "resample", "center_crop", "rescale_factor", "mean", "std", "convert_rgb"});
  return data;
}

PixelSize size_setting(const Json& data, const char* name) {
  const Json& value = data[name];
  if (value.is_null()) return {};
  if (!is_pixel_size(value)) {
    throw BundleError(std::string("preprocessing ") + name + " must be a positive height and width, not " + value.dump());
  }
  return {value[0].get<int64_t>(), value[1].get<int64_t>()};
}

}  // namespace

CropPreprocessing::CropPreprocessing(const Json& data)
    : resize_to_(size_setting(checked(data), "resize_to")), center_crop_(size_setting(data, "center_crop")), settings_(data) {
  if (data["shortest_edge"].is_null() == data["resize_to"].is_null()) {
    throw BundleError("preprocessing needs exactly one of shortest_edge and resize_to");
  }
  if (!data["shortest_edge"].is_null()) shortest_edge_ = positive_setting(data, "shortest_edge");
  if (!has_fixed_size() && !is_cropped()) {
    throw BundleError("preprocessing needs center_crop or resize_to: the model's input has one fixed size");
  }
}

PreparedPictures CropPreprocessing::prepare(const std::vector<Picture>& pictures, int64_t grid_rows, int64_t grid_columns) const {
  std::vector<VisualGrid> grids;
  for (const Picture& picture : pictures) {
    grids.push_back({static_cast<int64_t>(grids.size()), grid_rows, grid_columns, box_in_picture(picture.width, picture.height)});
  }
  return {{{"pixel_values", pixels(pictures)}}, VisualLayout::of_whole_grids(std::move(grids))};
}

Tensor CropPreprocessing::pixels(const std::vector<Picture>& pictures) const {
  const auto [height, width] = input_size();
  Tensor values = host_tensor({static_cast<int64_t>(pictures.size()), 3, height, width}, DataType::float32);
  float* target = values.data<float>();
  for (const Picture& picture : pictures) {
    check_picture_size("the picture", picture.width, picture.height);
    settings_.check_mode(picture);
    const auto [resized_height, resized_width] = resized_size(picture.width, picture.height);
    settings_.write(cropped(resized(picture, resized_width, resized_height, settings_.resample())), target);
    target += 3 * height * width;
  }
  return values;
}

std::array<double, 4> CropPreprocessing::box_in_picture(int64_t width, int64_t height) const {
  const auto [resized_height, resized_width] = resized_size(width, height);
  const auto [input_height, input_width] = input_size();
  const auto top = static_cast<double>(floor_divided(resized_height - input_height, 2));
  const auto left = static_cast<double>(floor_divided(resized_width - input_width, 2));
  const double scale_x = static_cast<double>(width) / static_cast<double>(resized_width);
  const double scale_y = static_cast<double>(height) / static_cast<double>(resized_height);
  return {left * scale_x, top * scale_y, (left + static_cast<double>(input_width)) * scale_x,
          (top + static_cast<double>(input_height)) * scale_y};
}

PixelSize CropPreprocessing::resized_size(int64_t width, int64_t height) const {
  if (has_fixed_size()) return resize_to_;
  const int64_t shorter = std::min(width, height), longer = std::max(width, height);
  const double exact = static_cast<double>(shortest_edge_ * longer) / static_cast<double>(shorter);
  if (exact * static_cast<double>(shortest_edge_) > static_cast<double>(kMaxPixels) + static_cast<double>(shortest_edge_)) {
    throw PictureError("a picture of " + std::to_string(width) + " × " + std::to_string(height) +
                       " pixels is too long to be resized: crop it to a less extreme aspect ratio");
  }
  const auto resized_longer = static_cast<int64_t>(exact);
  return width <= height ? PixelSize{resized_longer, shortest_edge_} : PixelSize{shortest_edge_, resized_longer};
}

Picture CropPreprocessing::cropped(const Picture& picture) const {
  const auto [height, width] = input_size();
  // An odd rest goes to the bottom and right when cutting.
  const int64_t top = floor_divided(picture.height - height, 2), left = floor_divided(picture.width - width, 2);
  const int64_t first_x = std::max<int64_t>(left, 0), first_y = std::max<int64_t>(top, 0);
  Picture inside = picture.cut(first_x, first_y, std::min(picture.width, left + width) - first_x,
                               std::min(picture.height, top + height) - first_y);
  if (inside.width == width && inside.height == height) return inside;
  Picture padded = Picture::filled(width, height, 0, 0, 0);
  padded.paste(inside, std::max<int64_t>(-left, 0), std::max<int64_t>(-top, 0));
  return padded;
}

}  // namespace edgeprune
