// A bundle: the folder that export writes and every other step reads.
#pragma once

#include <filesystem>
#include <string>

#include "bundle/manifest.h"

namespace edgeprune {

class Bundle {
 public:
  // Reads the manifest and checks the files; those above 64 MiB by size only.
  // Throws BundleError: no bundle, or a file is missing or changed.
  explicit Bundle(const std::filesystem::path& folder);

  const Manifest& manifest() const { return manifest_; }
  std::filesystem::path file(const FileEntry& entry) const { return folder_ / std::filesystem::u8path(entry.path); }
  // The content of a text file of the bundle.
  std::string text(const FileEntry& entry) const;

 private:
  void check(const FileEntry& entry) const;

  std::filesystem::path folder_;
  Manifest manifest_;
};

}  // namespace edgeprune
