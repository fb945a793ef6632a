#include "bundle/sha256.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <vector>

namespace edgeprune {
namespace {

__extension__ using Wide = unsigned __int128;

uint32_t rotated(uint32_t value, int bits) { return (value >> bits) | (value << (32 - bits)); }

// The first 64 primes: their cube roots' fractions are the round constants, their square roots' the first state.
std::array<uint32_t, 64> primes() {
  std::array<uint32_t, 64> found{};
  size_t count = 0;
  for (uint32_t candidate = 2; count < found.size(); ++candidate) {
    const bool divisible = std::any_of(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(count),
                                       [&](uint32_t prime) { return candidate % prime == 0; });
    if (!divisible) found[count++] = candidate;
  }
  return found;
}

// The first 32 bits of the fraction of the degree-th root, exact: by bisection over integers.
uint32_t fraction_of_root(uint32_t number, int degree) {
  // root = r / 2^32 with r the largest for which r^degree <= number * 2^(32 * degree)
  Wide low = 0, high = static_cast<Wide>(1) << 36;
  const auto fits = [&](Wide root) {
    // The root is below 2^36, its cube below 2^108: both sides fit.
    Wide power = root;
    for (int i = 1; i < degree; ++i) power *= root;
    return power <= (static_cast<Wide>(number) << (32 * degree));
  };
  while (high - low > 1) {
    const Wide middle = (low + high) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return static_cast<uint32_t>(low);
}

const std::array<uint32_t, 64>& round_constants() {
  static const std::array<uint32_t, 64> constants = [] {
    std::array<uint32_t, 64> made = primes();
    for (uint32_t& value : made) value = fraction_of_root(value, 3);
    return made;
  }();
  return constants;
}

}  // namespace

Sha256::Sha256() : state_{} {
  static const std::array<uint32_t, 64> first = primes();
  for (size_t i = 0; i < state_.size(); ++i) state_[i] = fraction_of_root(first[i], 2);
}

void Sha256::block(const uint8_t* bytes) {
  const std::array<uint32_t, 64>& constants = round_constants();
  std::array<uint32_t, 64> schedule;
  for (size_t i = 0; i < 16; ++i) {
    schedule[i] = static_cast<uint32_t>(bytes[4 * i]) << 24 | static_cast<uint32_t>(bytes[4 * i + 1]) << 16 |
                  static_cast<uint32_t>(bytes[4 * i + 2]) << 8 | static_cast<uint32_t>(bytes[4 * i + 3]);
  }
  for (size_t i = 16; i < 64; ++i) {
    const uint32_t before = schedule[i - 15], late = schedule[i - 2];
    const uint32_t s0 = rotated(before, 7) ^ rotated(before, 18) ^ (before >> 3);
    const uint32_t s1 = rotated(late, 17) ^ rotated(late, 19) ^ (late >> 10);
    schedule[i] = schedule[i - 16] + s0 + schedule[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (size_t i = 0; i < 64; ++i) {
    const uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
    const uint32_t first = h + s1 + ((e & f) ^ (~e & g)) + constants[i] + schedule[i];
    const uint32_t s0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
    const uint32_t second = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
  }
  const std::array<uint32_t, 8> rounds{a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < 8; ++i) state_[i] += rounds[i];
}

void Sha256::add(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  total_ += size;
  if (num_pending_ > 0) {
    const size_t taken = std::min(size, pending_.size() - num_pending_);
    std::memcpy(pending_.data() + num_pending_, bytes, taken);
    num_pending_ += taken, bytes += taken, size -= taken;
    if (num_pending_ < pending_.size()) return;
    block(pending_.data());
    num_pending_ = 0;
  }
  for (; size >= 64; bytes += 64, size -= 64) block(bytes);
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
