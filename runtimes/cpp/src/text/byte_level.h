// GPT-2's printable stand-ins for bytes: a byte-level vocabulary is text in them.
#pragma once

#include <optional>
#include <string>

#include "text/unicode.h"

namespace edgeprune {

char32_t stand_in(unsigned char byte);
std::optional<unsigned char> byte_of_stand_in(char32_t code);

}  // namespace edgeprune
