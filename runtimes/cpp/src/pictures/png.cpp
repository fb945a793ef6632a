// PNG through stb_image, which checks neither checksums nor ends: that is done here.
#include <algorithm>
#include <array>
#include <climits>
#include <cstring>
#include <memory>
#include <vector>

#include "pictures/picture_file.h"

#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_STATIC
#define STBI_ONLY_PNG
#define STBI_NO_STDIO
#define STBI_NO_LINEAR
#define STBI_NO_HDR
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wsign-compare"
#endif
#include <stb/stb_image.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace edgeprune {
namespace {

constexpr std::array<uint8_t, 8> kSignature = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};

uint32_t big_endian(const uint8_t* bytes) {
  return static_cast<uint32_t>(bytes[0]) << 24 | static_cast<uint32_t>(bytes[1]) << 16 |
         static_cast<uint32_t>(bytes[2]) << 8 | static_cast<uint32_t>(bytes[3]);
}

uint32_t checksum(const uint8_t* bytes, size_t size) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> made{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = (value & 1) != 0 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
      made[byte] = value;
    }
    return made;
  }();
  uint32_t sum = 0xFFFFFFFFu;
  for (size_t index = 0; index < size; ++index) sum = table[(sum ^ bytes[index]) & 255] ^ (sum >> 8);
  return ~sum;
}

// Whether the file has one channel of 16 bits: the header's bit depth and colour type.
bool is_deep_grey(Bytes file) { return file.data[24] == 16 && file.data[25] == 0; }

// 16-bit grey values are cut off at 255, not scaled: what Pillow does.
Picture deep_grey_picture(Bytes file, const std::string& name) {
  int width = 0, height = 0, channels = 0;
  const std::unique_ptr<stbi_us, void (*)(void*)> values(
      stbi_load_16_from_memory(file.data, static_cast<int>(file.size), &width, &height, &channels, 1), stbi_image_free);
  if (values == nullptr) refuse_damaged_picture(name, stbi_failure_reason());
  std::vector<uint8_t> grey(static_cast<size_t>(width) * static_cast<size_t>(height));
  std::transform(values.get(), values.get() + grey.size(), grey.begin(),
                 [](stbi_us value) { return static_cast<uint8_t>(std::min<stbi_us>(value, 255)); });
  return picture_from_pixels(grey.data(), width, height, 1, width);
}

// Walks the chunks up to IEND; returns EXIF's orientation.
int checked_chunks(Bytes file, const std::string& name) {
  int orientation = 1;
  size_t at = kSignature.size();
  for (bool first = true;; first = false) {
    if (file.size - at < 12) refuse_damaged_picture(name, "a chunk is cut short");
    const uint8_t* chunk = file.data + at;
    const size_t length = big_endian(chunk);
    if (length > file.size - at - 12) refuse_damaged_picture(name, "a chunk is cut short");
    if (checksum(chunk + 4, length + 4) != big_endian(chunk + 8 + length)) {
      refuse_damaged_picture(name, "a checksum is wrong");
    }
    const bool header = std::memcmp(chunk + 4, "IHDR", 4) == 0;
    if (header != first || (header && length != 13)) refuse_damaged_picture(name, "its header is wrong");
    if (header) check_picture_size(name, big_endian(chunk + 8), big_endian(chunk + 12));
    if (std::memcmp(chunk + 4, "eXIf", 4) == 0) orientation = exif_orientation({chunk + 8, length});
    if (std::memcmp(chunk + 4, "IEND", 4) == 0) return orientation;
    at += length + 12;
  }
}

}  // namespace

bool is_png(Bytes file) {
  return file.size >= kSignature.size() && std::memcmp(file.data, kSignature.data(), kSignature.size()) == 0;
}

Picture decode_png(Bytes file, const std::string& name, int& orientation) {
  orientation = checked_chunks(file, name);
  if (file.size > INT_MAX) refuse_damaged_picture(name, "it is larger than 2 GiB");
  if (is_deep_grey(file)) return deep_grey_picture(file, name);
  int width = 0, height = 0, channels = 0;
  const std::unique_ptr<stbi_uc, void (*)(void*)> pixels(
      stbi_load_from_memory(file.data, static_cast<int>(file.size), &width, &height, &channels, 3), stbi_image_free);
  if (pixels == nullptr) refuse_damaged_picture(name, stbi_failure_reason());
  return picture_from_pixels(pixels.get(), width, height, 3, int64_t{width} * 3);
}

}  // namespace edgeprune
