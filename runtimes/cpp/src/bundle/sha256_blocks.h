// The compression function of SHA-256 (FIPS 180-4) over whole blocks of 64 bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace edgeprune::sha256 {

using State = std::array<uint32_t, 8>;

// The state before the first block.
State first_state();

// By the processor's own instructions where it has them (x86: SHA, ARM: SHA2), which every engine and graph of gigabytes
// waits for.
void add_blocks(State& state, const uint8_t* bytes, size_t count);

// In plain C++, the same.
void add_blocks_portably(State& state, const uint8_t* bytes, size_t count);

}  // namespace edgeprune::sha256
