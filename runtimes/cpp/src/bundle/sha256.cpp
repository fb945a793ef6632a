#include "bundle/sha256.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <vector>

namespace edgeprune {

Sha256::Sha256() : state_(sha256::first_state()) {}

void Sha256::add(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  total_ += size;
  if (num_pending_ > 0) {
    const size_t taken = std::min(size, pending_.size() - num_pending_);
    std::memcpy(pending_.data() + num_pending_, bytes, taken);
    num_pending_ += taken, bytes += taken, size -= taken;
    if (num_pending_ < pending_.size()) return;
    sha256::add_blocks(state_, pending_.data(), 1);
    num_pending_ = 0;
  }
  const size_t whole = size / 64;
  sha256::add_blocks(state_, bytes, whole);
  bytes += 64 * whole, size -= 64 * whole;
  if (size > 0) std::memcpy(pending_.data(), bytes, size);
  num_pending_ = size;
}

std::string Sha256::finish() {
  const uint64_t bits = 8 * total_;
  const uint8_t one = 0x80, zero = 0;
  add(&one, 1);
  while (num_pending_ != 56) add(&zero, 1);
  std::array<uint8_t, 8> length;
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
  add(length.data(), length.size());
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (const uint32_t word : state_) {
    for (int shift = 28; shift >= 0; shift -= 4) text += digits[(word >> shift) & 15];
  }
  return text;
}

std::string sha256_of_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path.string());
  Sha256 digest;
  std::vector<char> buffer(1 << 20);
  while (file) {
    file.read(buffer.data(), static_cast<std::streamsize>(buffer.size()));
    digest.add(buffer.data(), static_cast<size_t>(file.gcount()));
  }
  if (file.bad()) throw std::runtime_error("cannot read " + path.string());
  return digest.finish();
}

}  // namespace edgeprune
