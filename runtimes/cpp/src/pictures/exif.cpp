#include <algorithm>

#include "pictures/picture_file.h"

namespace edgeprune {
namespace {

constexpr unsigned kOrientationTag = 0x0112;
constexpr unsigned kShort = 3;

class Tiff {
 public:
  explicit Tiff(Bytes bytes) : bytes_(bytes), little_(bytes.size > 0 && bytes.data[0] == 'I') {}
  bool has(size_t at, size_t count) const { return at <= bytes_.size && count <= bytes_.size - at; }
  unsigned two(size_t at) const {
    const unsigned first = bytes_.data[at], second = bytes_.data[at + 1];
    return little_ ? first | second << 8 : first << 8 | second;
  }
  size_t four(size_t at) const {
    const size_t first = two(at), second = two(at + 2);
    return little_ ? first | second << 16 : first << 16 | second;
  }

 private:
  Bytes bytes_;
  bool little_;
};

}  // namespace

int exif_orientation(Bytes bytes) {
  const Tiff tiff(bytes);
  if (!tiff.has(0, 8) || tiff.two(2) != 42) return 1;
  const size_t directory = tiff.four(4);
  if (!tiff.has(directory, 2)) return 1;
  const unsigned count = tiff.two(directory);
  for (unsigned index = 0; index < count; ++index) {
    const size_t entry = directory + 2 + 12 * size_t{index};
    if (!tiff.has(entry, 12)) return 1;
    if (tiff.two(entry) != kOrientationTag || tiff.two(entry + 2) != kShort) continue;
    const unsigned value = tiff.two(entry + 8);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

Picture upright(Picture picture, int orientation) {
  if (orientation <= 1) return picture;
  const bool swapped = orientation >= 5;
  Picture turned{swapped ? picture.height : picture.width, swapped ? picture.width : picture.height,
                 std::vector<uint8_t>(picture.pixels.size()), picture.was_rgb};
  for (int64_t y = 0; y < turned.height; ++y) {
    for (int64_t x = 0; x < turned.width; ++x) {
      // Where the stored picture shows this pixel.
      int64_t from_x = swapped ? y : x, from_y = swapped ? x : y;
      if (orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8) from_x = picture.width - 1 - from_x;
      if (orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7) from_y = picture.height - 1 - from_y;
      std::copy_n(picture.row(from_y) + 3 * from_x, 3, turned.row(y) + 3 * x);
    }
  }
  return turned;
}

}  // namespace edgeprune
