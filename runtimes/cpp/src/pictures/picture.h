// A picture in memory: 8-bit RGB, row by row.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace edgeprune {

// Largest picture that is decoded or made by a resize.
constexpr int64_t kMaxPixels = 178956970;

struct Picture {
  int64_t width = 0;
  int64_t height = 0;
  std::vector<uint8_t> pixels;  // height * width * 3
  bool was_rgb = true;          // false where it had another mode and is converted

  static Picture filled(int64_t width, int64_t height, uint8_t red, uint8_t green, uint8_t blue);
  const uint8_t* row(int64_t y) const { return pixels.data() + y * width * 3; }
  uint8_t* row(int64_t y) { return pixels.data() + y * width * 3; }
  // A part that lies inside.
  Picture cut(int64_t left, int64_t top, int64_t cut_width, int64_t cut_height) const;
  // Put another picture, which fits, on this one.
  void paste(const Picture& other, int64_t left, int64_t top);
};

// Throws PictureError: empty or too large.
void check_picture_size(const std::string& name, int64_t width, int64_t height);

// Of pixels [height, width, channels], channels 1 (grey), 3 (RGB) or 4 (RGBA; what is transparent becomes white),
// rows `stride` bytes apart. Throws PictureError.
Picture picture_from_pixels(const uint8_t* pixels, int64_t width, int64_t height, int64_t channels, int64_t stride);

}  // namespace edgeprune
