#include "pictures/picture_file.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

#include "error.h"

namespace edgeprune {

Picture read_picture(const std::string& path) {
  if (path.rfind("http://", 0) == 0 || path.rfind("https://", 0) == 0) {
    throw PictureError(path + " is an address: download the picture and give its path");
  }
  std::error_code failed;
  if (!std::filesystem::exists(path, failed)) throw PictureError(path + " does not exist: check the path");
  std::ifstream file(path, std::ios::binary);
  std::vector<char> content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || !std::filesystem::is_regular_file(path, failed)) {
    throw PictureError(path + " cannot be read: give the path of a readable picture file");
  }
  return decode_picture(reinterpret_cast<const uint8_t*>(content.data()), content.size(), path);
}

Picture decode_picture(const uint8_t* data, size_t size, const std::string& name) {
  const Bytes file{data, size};
  int orientation = 1;
  if (is_png(file)) {
    Picture picture = decode_png(file, name, orientation);
    return upright(std::move(picture), orientation);
  }
  if (is_jpeg(file)) {
    Picture picture = decode_jpeg(file, name, orientation);
    return upright(std::move(picture), orientation);
  }
  throw PictureError(name + " is not a picture that edgeprune's library can read: convert it to PNG or JPEG");
}

void refuse_damaged_picture(const std::string& name, const std::string& why) {
  throw PictureError(name + " is truncated or damaged (" + why + "): copy or save it again");
}

}  // namespace edgeprune
