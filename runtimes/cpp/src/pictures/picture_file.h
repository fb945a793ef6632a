// Picture files: PNG and JPEG, turned upright, in RGB; pixel by pixel what Pillow reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "pictures/picture.h"

namespace edgeprune {

// Throw PictureError: there is no such file, it is not a picture, it is damaged, empty or too large.
Picture read_picture(const std::string& path);
Picture decode_picture(const uint8_t* data, size_t size, const std::string& name = "the picture");

// A view of a file's bytes.
struct Bytes {
  const uint8_t* data;
  size_t size;
};

bool is_png(Bytes file);
Picture decode_png(Bytes file, const std::string& name, int& orientation);
bool is_jpeg(Bytes file);
Picture decode_jpeg(Bytes file, const std::string& name, int& orientation);

// EXIF's orientation, 1 … 8, of a TIFF header with its tags; 1 where there is none.
int exif_orientation(Bytes tiff);
// The picture as a viewer shows it.
Picture upright(Picture picture, int orientation);

[[noreturn]] void refuse_damaged_picture(const std::string& name, const std::string& why);

}  // namespace edgeprune
