#include "tensorrt/engine_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bundle/sha256.h"
#include "error.h"

namespace edgeprune {

EngineFile::EngineFile(const std::filesystem::path& path, const FileEntry& entry) {
  const std::string engine = "the engine " + path.filename().string();
  const auto refuse = [&](const std::string& why) { throw BackendError(engine + " " + why + ": " + kBuildEngineAgain); };
  std::error_code failed;
  if (!std::filesystem::is_regular_file(path, failed)) refuse("is missing");
  const uintmax_t size = std::filesystem::file_size(path, failed);
  if (failed || size != static_cast<uintmax_t>(entry.bytes) || size == 0) refuse("is not the file that was built (truncated?)");
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) refuse("cannot be read");
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) refuse("cannot be read");
  Sha256 digest;
  digest.add(mapped, size);
  if (digest.finish() != entry.sha256) {
    munmap(mapped, size);
    refuse("is not the file that was built (damaged?)");
  }
  data_ = mapped;
  size_ = size;
}

EngineFile::~EngineFile() { munmap(data_, size_); }

}  // namespace edgeprune
