// JPEG through libjpeg-turbo, with the transform and the upsampling that Pillow uses: libjpeg's own defaults.
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <vector>

#include "error.h"
#include "pictures/picture_file.h"

#if defined(EDGEPRUNE_JPEG)
#include <jerror.h>
#include <jpeglib.h>
#endif

namespace edgeprune {

bool is_jpeg(Bytes file) {
  return file.size >= 3 && file.data[0] == 0xFF && file.data[1] == 0xD8 && file.data[2] == 0xFF;
}

#if !defined(EDGEPRUNE_JPEG)

Picture decode_jpeg(Bytes, const std::string& name, int&) {
  throw PictureError(name + " is a JPEG, and this library was built without libjpeg: convert it to PNG, or build it where "
                            "libjpeg's headers are installed");
}

#else

namespace {

constexpr char kExif[] = "Exif\0";  // and the array's own zero: six bytes
constexpr char kXmp[] = "http://ns.adobe.com/xap/1.0/";

struct Failure {
  jpeg_error_mgr manager;  // first: libjpeg hands back a pointer to it
  std::jmp_buf back;
  char message[JMSG_LENGTH_MAX];
};

void fail(j_common_ptr info) {
  auto* failure = reinterpret_cast<Failure*>(info->err);
  info->err->format_message(info, failure->message);
  std::longjmp(failure->back, 1);
}

// libjpeg makes up what a truncated file lacks; Pillow refuses it.
void warn(j_common_ptr info, int level) {
  if (level < 0 && info->err->msg_code == JWRN_JPEG_EOF) fail(info);
}

void say_nothing(j_common_ptr) {}

// Everything that must outlive a longjmp.
struct Decoder {
  jpeg_decompress_struct info{};
  Failure failure{};
  int channels = 0;
  std::vector<uint8_t> pixels;

  Decoder() {
    info.err = jpeg_std_error(&failure.manager);
    failure.manager.error_exit = fail;
    failure.manager.emit_message = warn;
    failure.manager.output_message = say_nothing;
  }
  ~Decoder() { jpeg_destroy_decompress(&info); }
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // No object with a destructor lives in these two: a longjmp passes over them.
  bool read_header(Bytes file) {
    if (setjmp(failure.back) != 0) return false;
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, file.data, static_cast<unsigned long>(file.size));
    jpeg_save_markers(&info, JPEG_APP0 + 1, 0xFFFF);
    jpeg_read_header(&info, TRUE);
    return true;
  }
  bool read_pixels() {
    if (setjmp(failure.back) != 0) return false;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
      JSAMPROW row = pixels.data() + size_t{info.output_scanline} * info.output_width * static_cast<size_t>(channels);
      jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    return true;
  }
};

int orientation_of_xmp(const char* text, size_t size) {
  const std::string xmp(text, size);
  const size_t at = xmp.find("tiff:Orientation");
  if (at == std::string::npos) return 1;
  size_t value = at + std::strlen("tiff:Orientation");
  if (xmp.compare(value, 2, "=\"") == 0) {
    value += 2;
  } else if (xmp.compare(value, 1, ">") == 0) {
    value += 1;
  } else {
    return 1;
  }
  return value < xmp.size() && xmp[value] >= '1' && xmp[value] <= '8' ? xmp[value] - '0' : 1;
}

int orientation_of(const jpeg_decompress_struct& info) {
  int by_exif = 1, by_xmp = 1;
  bool has_exif = false;
  for (const jpeg_marker_struct* marker = info.marker_list; marker != nullptr; marker = marker->next) {
    const auto* text = reinterpret_cast<const char*>(marker->data);
    if (marker->data_length > sizeof kExif && std::memcmp(text, kExif, sizeof kExif) == 0 && !has_exif) {
      by_exif = exif_orientation({marker->data + sizeof kExif, marker->data_length - sizeof kExif});
      has_exif = true;
    } else if (marker->data_length > sizeof kXmp && std::memcmp(text, kXmp, sizeof kXmp) == 0) {
      by_xmp = orientation_of_xmp(text, marker->data_length);
    }
  }
  return by_exif != 1 ? by_exif : by_xmp;
}

// Adobe writes CMYK inverted; Pillow's conversion to RGB.
void rgb_from_cmyk(std::vector<uint8_t>& pixels, bool inverted) {
  size_t target = 0;
  for (size_t source = 0; source < pixels.size(); source += 4) {
    const auto ink = [&](size_t channel) {
      return static_cast<unsigned>(inverted ? 255 - pixels[source + channel] : pixels[source + channel]);
    };
    const unsigned rest = 255 - ink(3);
    unsigned colour[3];
    for (size_t channel = 0; channel < 3; ++channel) {
      const unsigned product = ink(channel) * rest + 128;
      const unsigned taken = ((product >> 8) + product) >> 8;
      colour[channel] = taken > rest ? 0 : rest - taken;
    }
    for (const unsigned value : colour) pixels[target++] = static_cast<uint8_t>(value);
  }
  pixels.resize(target);
}

}  // namespace

Picture decode_jpeg(Bytes file, const std::string& name, int& orientation) {
  Decoder decoder;
  jpeg_decompress_struct& info = decoder.info;
  if (!decoder.read_header(file)) refuse_damaged_picture(name, decoder.failure.message);
  check_picture_size(name, info.image_width, info.image_height);
  orientation = orientation_of(info);
  const bool cmyk = info.num_components == 4;
  info.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
  decoder.channels = cmyk ? 4 : 3;
  decoder.pixels.resize(size_t{info.image_width} * info.image_height * static_cast<size_t>(decoder.channels));
  if (!decoder.read_pixels()) refuse_damaged_picture(name, decoder.failure.message);
  if (cmyk) rgb_from_cmyk(decoder.pixels, info.saw_Adobe_marker != FALSE);
  return picture_from_pixels(decoder.pixels.data(), info.image_width, info.image_height, 3, int64_t{info.image_width} * 3);
}

#endif

}  // namespace edgeprune
