#include "pictures/picture.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace edgeprune {
namespace {

// A colour over white, in the fixed-point arithmetic of Pillow's alpha_composite.
uint8_t over_white(uint32_t value, uint32_t alpha) {
  constexpr uint32_t kBits = 7;
  if (alpha == 0) return 255;
  const uint32_t out_alpha = alpha * 255 + 255 * (255 - alpha);
  const uint32_t share = alpha * 255 * 255 * (1u << kBits) / out_alpha;
  const uint32_t rest = 255 * (1u << kBits) - share;
  const uint32_t sum = value * share + 255 * rest + (0x80u << kBits);
  return static_cast<uint8_t>((((sum >> 8) + sum) >> 8) >> kBits);
}

}  // namespace

Picture Picture::filled(int64_t width, int64_t height, uint8_t red, uint8_t green, uint8_t blue) {
  Picture picture{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3))};
  for (size_t at = 0; at < picture.pixels.size(); at += 3) {
    picture.pixels[at] = red, picture.pixels[at + 1] = green, picture.pixels[at + 2] = blue;
  }
  return picture;
}

Picture Picture::cut(int64_t left, int64_t top, int64_t cut_width, int64_t cut_height) const {
  Picture part{cut_width, cut_height, std::vector<uint8_t>(static_cast<size_t>(cut_width * cut_height * 3)), was_rgb};
  for (int64_t y = 0; y < cut_height; ++y) {
    std::memcpy(part.row(y), row(top + y) + 3 * left, static_cast<size_t>(3 * cut_width));
  }
  return part;
}

void Picture::paste(const Picture& other, int64_t left, int64_t top) {
  for (int64_t y = 0; y < other.height; ++y) {
    std::memcpy(row(top + y) + 3 * left, other.row(y), static_cast<size_t>(3 * other.width));
  }
}

void check_picture_size(const std::string& name, int64_t width, int64_t height) {
  const std::string size = std::to_string(width) + " × " + std::to_string(height);
  if (width <= 0 || height <= 0) {
    throw PictureError(name + " is empty (" + size + "): give a picture with at least one pixel");
  }
  if (width > kMaxPixels / height) {
    throw PictureError(name + " has " + size + " pixels, more than the " + std::to_string(kMaxPixels) +
                       " that are decoded: scale it down first");
  }
}

Picture picture_from_pixels(const uint8_t* pixels, int64_t width, int64_t height, int64_t channels, int64_t stride) {
  check_picture_size("the picture", width, height);
  if (channels != 1 && channels != 3 && channels != 4) {
    throw PictureError("pixels of " + std::to_string(channels) +
                       " channels are not a picture: give uint8 of shape [height, width, 1, 3 or 4]");
  }
  if (stride < width * channels) {
    throw PictureError("rows " + std::to_string(stride) + " bytes apart are shorter than " + std::to_string(width) +
                       " pixels: give the bytes from one row to the next");
  }
  Picture picture{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3)), channels == 3};
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t* source = pixels + y * stride;
    uint8_t* target = picture.row(y);
    for (int64_t x = 0; x < width; ++x, source += channels, target += 3) {
      for (int64_t channel = 0; channel < 3; ++channel) {
        const uint8_t value = source[channels == 1 ? 0 : channel];
        target[channel] = channels == 4 ? over_white(value, source[3]) : value;
      }
    }
  }
  return picture;
}

}  // namespace edgeprune
