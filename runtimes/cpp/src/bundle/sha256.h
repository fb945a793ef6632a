// SHA-256 (FIPS 180-4) of a file.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>

#include "bundle/sha256_blocks.h"

namespace edgeprune {

class Sha256 {
 public:
  Sha256();
  void add(const void* data, size_t size);
  // In lower-case hexadecimal; nothing may be added afterwards.
  std::string finish();

 private:
  sha256::State state_;
  std::array<uint8_t, 64> pending_{};
  size_t num_pending_ = 0;
  uint64_t total_ = 0;
};

// Throws std::runtime_error if the file cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace edgeprune
