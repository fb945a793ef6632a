#include "pictures/preprocessing.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace edgeprune {

void check_setting_names(const Json& data, const std::string& what, const std::vector<const char*>& names) {
  if (!data.is_object()) throw BundleError(what + " must be an object, not " + data.dump() + ": export the bundle again");
  std::vector<std::string> wrong;
  for (const char* name : names) {
    if (!data.contains(name)) wrong.emplace_back(name);
  }
  for (const auto& [name, value] : data.items()) {
    const auto is_known = [&, &field = name](const char* known) { return field == known; };
    if (std::none_of(names.begin(), names.end(), is_known)) wrong.push_back(name);
  }
  if (wrong.empty()) return;
  std::sort(wrong.begin(), wrong.end());
  std::string joined;
  for (const std::string& name : wrong) joined += (joined.empty() ? "" : ", ") + name;
  throw BundleError(what + " has unknown or lacks fields " + joined + ": export the bundle again");
}

int64_t positive_setting(const Json& data, const char* name, int64_t least) {
  const Json& value = data[name];
  if (!value.is_number_integer() || value.get<int64_t>() < least || value.get<int64_t>() > kMaxPixels) {
    throw BundleError(std::string("preprocessing ") + name + " must be an integer of at least " + std::to_string(least) +
                      ", not " + value.dump());
  }
  return value.get<int64_t>();
}

bool is_pixel_size(const Json& value) {
  if (!value.is_array() || value.size() != 2) return false;
  for (const Json& side : value) {
    if (!side.is_number_integer() || side.get<int64_t>() < 1 || side.get<int64_t>() > kMaxPixels) return false;
  }
  return value[0].get<int64_t>() <= kMaxPixels / value[1].get<int64_t>();
}

namespace {

bool is_finite(const Json& value) { return value.is_number() && std::isfinite(value.get<double>()); }

std::array<float, 3> three_numbers(const Json& data, const char* name) {
  const Json& values = data[name];
  if (!values.is_array() || values.size() != 3 || !std::all_of(values.begin(), values.end(), is_finite)) {
    throw BundleError(std::string("preprocessing ") + name + " must be three numbers, not " + values.dump());
  }
  return {values[0].get<float>(), values[1].get<float>(), values[2].get<float>()};
}

}  // namespace

PixelSettings::PixelSettings(const Json& data) {
  const Json& name = data["resample"];
  const auto kind = name.is_string() ? resampling(name.get<std::string>()) : std::nullopt;
  if (!kind) throw BundleError("preprocessing resample must be one of " + known_resamplings() + ", not " + name.dump());
  resample_ = *kind;
  const Json& factor = data["rescale_factor"];
  if (!is_finite(factor) || factor.get<double>() <= 0) {
    throw BundleError("preprocessing rescale_factor must be a positive number, not " + factor.dump());
  }
  const std::array<float, 3> mean = three_numbers(data, "mean"), std = three_numbers(data, "std");
  if (*std::min_element(std.begin(), std.end()) <= 0) {
    throw BundleError("preprocessing std must be positive, not " + data["std"].dump());
  }
  if (!data["convert_rgb"].is_boolean()) {
    throw BundleError("preprocessing convert_rgb must be true or false, not " + data["convert_rgb"].dump());
  }
  convert_rgb_ = data["convert_rgb"].get<bool>();
  for (size_t channel = 0; channel < 3; ++channel) {
    for (size_t value = 0; value < 256; ++value) {
      // transformers multiplies in float64 and normalizes in float32.
      const auto rescaled = static_cast<float>(static_cast<double>(value) * factor.get<double>());
      numbers_[channel][value] = (rescaled - mean[channel]) / std[channel];
    }
  }
}

void PixelSettings::check_mode(const Picture& picture) const {
  if (!convert_rgb_ && !picture.was_rgb) {
    throw PictureError("a picture of another mode is not RGB: give pixels of three channels");
  }
}

void PixelSettings::write(const Picture& picture, float* target) const {
  const auto count = static_cast<size_t>(picture.width * picture.height);
  for (size_t channel = 0; channel < 3; ++channel) {
    const std::array<float, 256>& of_value = numbers_[channel];
    const uint8_t* source = picture.pixels.data() + channel;
    for (size_t index = 0; index < count; ++index, source += 3) *target++ = of_value[*source];
  }
}

std::unique_ptr<PicturePreprocessing> preprocessing_from_json(const Json& data) {
  if (!data.is_object()) throw BundleError("preprocessing must be an object, not " + data.dump() + ": export the bundle again");
  Json settings = data;
  const Json kind = data.contains("kind") ? data["kind"] : Json();
  settings.erase("kind");
  if (kind == "anyres") return anyres_from_json(settings);
  if (kind == "crop") return std::make_unique<CropPreprocessing>(settings);
  if (kind == "pad") return square_padding_from_json(settings);
  if (kind == "tiles") return tiling_from_json(settings);
  if (kind == "patches") return flat_patches_from_json(settings);
  throw BundleError("preprocessing kind is " + kind.dump() +
                    ", known: anyres, crop, pad, tiles, patches; export the checkpoint again");
}

}  // namespace edgeprune
