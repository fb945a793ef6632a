// Any bytes as a picture file: decoded and made ready in every way that a tower may want it, or refused.
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "error.h"
#include "pictures/picture_file.h"
#include "pictures/preprocessing.h"

namespace {

using edgeprune::Json;
using Kinds = std::vector<std::unique_ptr<edgeprune::PicturePreprocessing>>;

// Larger pictures are other files of the same kinds, and slow.
constexpr uint64_t kMostPixels = 1 << 16;

uint64_t number(const uint8_t* bytes, size_t count) {
  uint64_t value = 0;
  for (size_t index = 0; index < count; ++index) value = value << 8 | bytes[index];
  return value;
}

bool is_large(const std::vector<uint8_t>& file) {
  if (edgeprune::is_png({file.data(), file.size()})) {
    return file.size() >= 24 && number(&file[16], 4) * number(&file[20], 4) > kMostPixels;
  }
  // Anything that could be the header of a JPEG's frame.
  for (size_t at = 0; at + 9 <= file.size(); ++at) {
    const bool frame = file[at] == 0xFF && file[at + 1] >= 0xC0 && file[at + 1] <= 0xCF;
    if (frame && number(&file[at + 5], 2) * number(&file[at + 7], 2) > kMostPixels) return true;
  }
  return false;
}

uint32_t checksum(const uint8_t* bytes, size_t size) {
  uint32_t sum = 0xFFFFFFFFu;
  for (size_t index = 0; index < size; ++index) {
    sum ^= bytes[index];
    for (int bit = 0; bit < 8; ++bit) sum = (sum & 1) != 0 ? 0xEDB88320u ^ (sum >> 1) : sum >> 1;
  }
  return ~sum;
}

// A PNG whose chunks have the checksums of what they hold: without, no mutation would come further.
void mend_checksums(std::vector<uint8_t>& file) {
  for (size_t at = 8; at + 12 <= file.size();) {
    const size_t length = number(&file[at], 4);
    if (length > file.size() - at - 12) return;
    const uint32_t sum = checksum(&file[at + 4], length + 4);
    for (size_t byte = 0; byte < 4; ++byte) file[at + 8 + length + byte] = static_cast<uint8_t>(sum >> (24 - 8 * byte));
    at += length + 12;
  }
}

const Kinds& kinds() {
  static const Kinds made = [] {
    const Json pixels = Json::parse(
        R"({"rescale_factor": 0.00392156862745098, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "convert_rgb": true,
            "resample": "bicubic"})");
    const auto with = [](Json settings, const char* more) {
      settings.update(Json::parse(more));
      return settings;
    };
    const Json crop = with(pixels, R"({"shortest_edge": 24, "resize_to": null, "center_crop": [24, 24]})");
    const Json tile = with(crop, R"({"shortest_edge": null, "resize_to": [24, 24], "center_crop": null})");
    const Json all[] = {
        with(crop, R"({"kind": "crop", "shortest_edge": 15, "resample": "lanczos"})"),
        Json{{"kind", "pad"}, {"crop", crop}, {"fill", {122, 116, 104}}},
        Json{{"kind", "anyres"}, {"tile", tile}, {"pinpoints", {{24, 48}, {48, 24}, {48, 48}}}},
        Json{{"kind", "tiles"}, {"tile", tile}, {"min_tiles", 1}, {"max_tiles", 6}},
        with(pixels, R"({"kind": "patches", "min_pixels": 1024, "max_pixels": 8192, "patch_size": 4,
                         "temporal_patch_size": 2, "merge_size": 2, "window_tokens": 3})")};
    Kinds kinds;
    for (const Json& settings : all) kinds.push_back(edgeprune::preprocessing_from_json(settings));
    return kinds;
  }();
  return made;
}

void decode_and_prepare(const std::vector<uint8_t>& file) {
  try {
    const std::vector<edgeprune::Picture> pictures = {edgeprune::decode_picture(file.data(), file.size())};
    for (const auto& kind : kinds()) {
      try {
        const edgeprune::PreparedPictures prepared = kind->prepare(pictures, 3, 4);
        const edgeprune::Tensor& pixels = prepared.inputs.at("pixel_values");
        for (int64_t index = 0; index < edgeprune::element_count(pixels.shape); ++index) {
          if (!std::isfinite(pixels.data<float>()[index])) std::abort();
        }
      } catch (const edgeprune::PictureError&) {
        // Too long for this kind.
      }
    }
  } catch (const edgeprune::PictureError&) {
    // What every file gets that is no picture.
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<uint8_t> file(data, data + size);
  if (is_large(file)) return 0;
  decode_and_prepare(file);
  if (edgeprune::is_png({file.data(), file.size()})) {
    mend_checksums(file);
    decode_and_prepare(file);
  }
  return 0;
}
