// NumPy's Generator(PCG64(seed)).random(): the same numbers from the same seed.
//
// SeedSequence and PCG XSL RR 128/64 as published: M. E. O'Neill, "PCG: A Family of Simple Fast Space-Efficient
// Statistically Good Algorithms for Random Number Generation", 2014; and NumPy's documentation of SeedSequence.
#pragma once

#include <cstdint>
#include <optional>

namespace edgeprune {

class Pcg64 {
 public:
  // Without a seed, other numbers each time.
  explicit Pcg64(std::optional<uint64_t> seed);

  // 0 ≤ number < 1, of 53 bits.
  double random();

 private:
  __extension__ using Wide = unsigned __int128;

  uint64_t next();

  Wide state_ = 0;
  Wide increment_ = 0;
};

}  // namespace edgeprune
