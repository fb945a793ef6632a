#include "decoder/pcg64.h"

#include <array>
#include <random>
#include <vector>

namespace edgeprune {
namespace {

constexpr size_t kPool = 4;

// NumPy's SeedSequence with a pool of four words.
class SeedSequence {
 public:
  explicit SeedSequence(const std::vector<uint32_t>& entropy) {
    for (size_t index = 0; index < kPool; ++index) pool_[index] = hashed(index < entropy.size() ? entropy[index] : 0);
    for (size_t source = 0; source < kPool; ++source) {
      for (size_t target = 0; target < kPool; ++target) {
        if (source != target) pool_[target] = mixed(pool_[target], hashed(pool_[source]));
      }
    }
    for (size_t source = kPool; source < entropy.size(); ++source) {
      for (uint32_t& word : pool_) word = mixed(word, hashed(entropy[source]));
    }
  }

  std::array<uint64_t, 4> words() const {
    std::array<uint32_t, 8> halves;
    uint32_t constant = 0x8B51F9DDu;
    for (size_t index = 0; index < halves.size(); ++index) {
      uint32_t value = pool_[index % kPool] ^ constant;
      constant *= 0x58F38DEDu;
      value *= constant;
      halves[index] = value ^ value >> 16;
    }
    std::array<uint64_t, 4> whole;
    for (size_t index = 0; index < whole.size(); ++index) {
      whole[index] = static_cast<uint64_t>(halves[2 * index]) | static_cast<uint64_t>(halves[2 * index + 1]) << 32;
    }
    return whole;
  }

 private:
  uint32_t hashed(uint32_t value) {
    value ^= constant_;
    constant_ *= 0x931E8875u;
    value *= constant_;
    return value ^ value >> 16;
  }
  static uint32_t mixed(uint32_t x, uint32_t y) {
    const uint32_t result = 0xCA01F9DDu * x - 0x4973F715u * y;
    return result ^ result >> 16;
  }

  std::array<uint32_t, kPool> pool_{};
  uint32_t constant_ = 0x43B0D7E5u;
};

std::vector<uint32_t> entropy_of(std::optional<uint64_t> seed) {
  if (!seed) {
    std::random_device device;
    return {device(), device(), device(), device()};
  }
  std::vector<uint32_t> words = {static_cast<uint32_t>(*seed)};
  if (*seed >> 32 != 0) words.push_back(static_cast<uint32_t>(*seed >> 32));
  return words;
}

}  // namespace

Pcg64::Pcg64(std::optional<uint64_t> seed) {
  const std::array<uint64_t, 4> words = SeedSequence(entropy_of(seed)).words();
  const Wide start = static_cast<Wide>(words[0]) << 64 | words[1];
  increment_ = (static_cast<Wide>(words[2]) << 64 | words[3]) << 1 | 1;
  next();
  state_ += start;
  next();
}

uint64_t Pcg64::next() {
  constexpr Wide multiplier = static_cast<Wide>(0x2360ED051FC65DA4u) << 64 | 0x4385DF649FCCF645u;
  state_ = state_ * multiplier + increment_;
  const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
  const auto turn = static_cast<unsigned>(state_ >> 122);
  return folded >> turn | folded << ((64 - turn) & 63);
}

double Pcg64::random() { return static_cast<double>(next() >> 11) * 0x1.0p-53; }

}  // namespace edgeprune
