// A serialized engine, mapped into memory.
#pragma once

#include <cstddef>
#include <filesystem>

#include "bundle/manifest.h"

namespace edgeprune {

// What mends an engine.
constexpr const char* kBuildEngineAgain =
    "build it again with edgeprune build BUNDLE --target this; the rest of the bundle is whole";

class EngineFile {
 public:
  // Throws BackendError: the file is missing or not the one that was built.
  EngineFile(const std::filesystem::path& path, const FileEntry& entry);
  ~EngineFile();
  EngineFile(const EngineFile&) = delete;
  EngineFile& operator=(const EngineFile&) = delete;

  const void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace edgeprune
