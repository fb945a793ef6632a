#include "text/byte_level.h"

#include <array>

namespace edgeprune {
namespace {

// Printable Latin-1 characters stand for themselves, the others for U+0100 … in their order.
std::array<char32_t, 256> stand_ins() {
  std::array<char32_t, 256> made{};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    made[byte] = printable ? byte : next++;
  }
  return made;
}

const std::array<char32_t, 256>& table() {
  static const std::array<char32_t, 256> made = stand_ins();
  return made;
}

}  // namespace

char32_t stand_in(unsigned char byte) { return table()[byte]; }

std::optional<unsigned char> byte_of_stand_in(char32_t code) {
  if (code >= 0x100 + 68) return std::nullopt;
  for (unsigned byte = 0; byte < 256; ++byte) {
    if (table()[byte] == code) return static_cast<unsigned char>(byte);
  }
  return std::nullopt;
}

}  // namespace edgeprune
