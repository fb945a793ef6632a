#include "bundle/bundle.h"

#include <fstream>
#include <set>

#include "bundle/sha256.h"
#include "error.h"

namespace edgeprune {
namespace {

constexpr int64_t kHashedAtOpenBytes = int64_t{64} << 20;
constexpr const char* kRemedy = "copy the bundle again or export the checkpoint again";

std::filesystem::path checked_folder(const std::filesystem::path& folder) {
  std::error_code failed;
  if (!std::filesystem::is_directory(folder, failed)) {
    throw BundleError(folder.string() + " is not a folder: give a bundle made by edgeprune export");
  }
  return folder;
}

}  // namespace

Bundle::Bundle(const std::filesystem::path& folder)
    : folder_(checked_folder(folder)), manifest_(read_manifest(folder / kManifestFile)) {
  std::set<std::string> checked;
  for (const FileEntry& entry : manifest_.files()) {
    if (checked.insert(entry.path + '\n' + entry.sha256 + std::to_string(entry.bytes)).second) check(entry);
  }
}

std::string Bundle::text(const FileEntry& entry) const {
  std::ifstream file(this->file(entry), std::ios::binary);
  // Its size was checked.
  std::string content(static_cast<size_t>(entry.bytes), '\0');
  if (!file.read(content.data(), static_cast<std::streamsize>(content.size()))) {
    throw BundleError(this->file(entry).string() + " cannot be read: export the bundle again");
  }
  return content;
}

void Bundle::check(const FileEntry& entry) const {
  const std::filesystem::path path = file(entry);
  std::error_code failed;
  if (!std::filesystem::is_regular_file(path, failed)) throw BundleError(path.string() + " is missing: " + kRemedy);
  const uintmax_t size = std::filesystem::file_size(path, failed);
  bool same = !failed && size == static_cast<uintmax_t>(entry.bytes);
  if (same && entry.bytes <= kHashedAtOpenBytes) {
    try {
      same = sha256_of_file(path) == entry.sha256;
    } catch (const std::runtime_error&) {
      same = false;
    }
  }
  if (!same) {
    throw BundleError(path.string() + " is not the file that was exported (changed or truncated): " + kRemedy);
  }
}

}  // namespace edgeprune
