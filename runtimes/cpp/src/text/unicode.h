// Characters: UTF-8, the properties that tokenizers ask for, and normal form C.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace edgeprune {

using CodePoints = std::u32string;

// False for anything that Unicode's table 3-7 does not allow.
bool is_utf8(std::string_view text);
// Valid UTF-8 only.
CodePoints code_points(std::string_view text);
std::string utf8(std::u32string_view text);
void append_utf8(std::string& text, char32_t code);
size_t count_code_points(std::string_view text);
// The text behind the first `count` characters.
std::string_view skip_code_points(std::string_view text, size_t count);
// Bytes as text, every longest beginning of a character that is cut short becoming U+FFFD.
std::string utf8_lossy(std::string_view bytes);

bool is_letter(char32_t code);  // \p{L}
bool is_number(char32_t code);  // \p{N}
bool is_space(char32_t code);   // White_Space
// The lower case, one or two characters.
CodePoints lower_case(char32_t code);

// One step of a canonical composition; 0 if there is none.
char32_t composed(char32_t first, char32_t second);
// Appends the canonical decomposition.
void decompose(char32_t code, CodePoints& into);
int combining_class(char32_t code);

}  // namespace edgeprune
