#include "text/unicode.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <utility>

namespace edgeprune {
namespace {

struct Range {
  char32_t first, last;
};
struct Lower {
  char32_t code, first, second;
};
struct Decomposition {
  char32_t code, first, second;
  int composes;
};
struct CombiningClass {
  char32_t first, last;
  int number;
};

#include "text/unicode_tables.inc"

constexpr char32_t kReplacement = 0xFFFD;

// Hangul syllables are computed (Unicode, 3.12).
constexpr char32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kTail = 0x11A7;
constexpr char32_t kLeads = 19, kVowels = 21, kTails = 28;

template <typename Entry, size_t N>
const Entry* range_of(const Entry (&table)[N], char32_t code) {
  const Entry* found = std::upper_bound(std::begin(table), std::end(table), code,
                                        [](char32_t value, const Entry& entry) { return value < entry.first; });
  if (found == std::begin(table)) return nullptr;
  --found;
  return code <= found->last ? found : nullptr;
}

template <typename Entry, size_t N>
const Entry* entry_of(const Entry (&table)[N], char32_t code) {
  const Entry* found = std::lower_bound(std::begin(table), std::end(table), code,
                                        [](const Entry& entry, char32_t value) { return entry.code < value; });
  return found != std::end(table) && found->code == code ? found : nullptr;
}

struct Decoded {
  char32_t code;
  size_t bytes;  // of the character, or of the longest beginning of one
  bool valid;
};

// The character at the start of `bytes`, of which there is at least one.
Decoded decode(std::string_view bytes) {
  const auto at = [&](size_t index) { return static_cast<unsigned char>(bytes[index]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {lead, 1, true};
  size_t length = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t code = 0;
  if (lead >= 0xC2 && lead <= 0xDF) length = 2, code = lead & 0x1Fu;
  if (lead >= 0xE0 && lead <= 0xEF) length = 3, code = lead & 0x0Fu;
  if (lead >= 0xF0 && lead <= 0xF4) length = 4, code = lead & 0x07u;
  if (length == 0) return {kReplacement, 1, false};
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t index = 1; index < length; ++index) {
    if (index >= bytes.size() || at(index) < low || at(index) > high) return {kReplacement, index, false};
    code = code << 6 | (at(index) & 0x3Fu);
    low = 0x80, high = 0xBF;
  }
  return {code, length, true};
}

}  // namespace

bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    const Decoded next = decode(text);
    if (!next.valid) return false;
    text.remove_prefix(next.bytes);
  }
  return true;
}

CodePoints code_points(std::string_view text) {
  CodePoints codes;
  codes.reserve(text.size());
  while (!text.empty()) {
    const Decoded next = decode(text);
    codes += next.code;
    text.remove_prefix(next.bytes);
  }
  return codes;
}

void append_utf8(std::string& text, char32_t code) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6), put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  } else {
    put(0xF0 | code >> 18), put(0x80 | (code >> 12 & 0x3F)), put(0x80 | (code >> 6 & 0x3F)), put(0x80 | (code & 0x3F));
  }
}

std::string utf8(std::u32string_view text) {
  std::string encoded;
  for (const char32_t code : text) append_utf8(encoded, code);
  return encoded;
}

size_t count_code_points(std::string_view text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0) != 0x80; }));
}

std::string_view skip_code_points(std::string_view text, size_t count) {
  for (; count > 0 && !text.empty(); --count) text.remove_prefix(decode(text).bytes);
  return text;
}

std::string utf8_lossy(std::string_view bytes) {
  std::string text;
  while (!bytes.empty()) {
    const Decoded next = decode(bytes);
    if (next.valid) {
      text += bytes.substr(0, next.bytes);
    } else {
      append_utf8(text, kReplacement);
    }
    bytes.remove_prefix(next.bytes);
  }
  return text;
}

bool is_letter(char32_t code) {
  if (code < 0x80) return (code | 0x20) >= 'a' && (code | 0x20) <= 'z';
  return range_of(kLetters, code) != nullptr;
}

bool is_number(char32_t code) {
  if (code < 0x80) return code >= '0' && code <= '9';
  return range_of(kNumbers, code) != nullptr;
}

bool is_space(char32_t code) {
  if (code < 0x80) return code == ' ' || (code >= '\t' && code <= '\r');
  return code == 0x85 || code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
         code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

CodePoints lower_case(char32_t code) {
  const Lower* lower = entry_of(kLower, code);
  if (lower == nullptr) return {code};
  return lower->second == 0 ? CodePoints{lower->first} : CodePoints{lower->first, lower->second};
}

void decompose(char32_t code, CodePoints& into) {
  if (code >= kSyllable && code < kSyllable + kLeads * kVowels * kTails) {
    const char32_t index = code - kSyllable;
    into += kLead + index / (kVowels * kTails);
    into += kVowel + index % (kVowels * kTails) / kTails;
    if (index % kTails != 0) into += kTail + index % kTails;
    return;
  }
  const Decomposition* entry = entry_of(kDecompositions, code);
  if (entry == nullptr) {
    into += code;
    return;
  }
  decompose(entry->first, into);
  if (entry->second != 0) decompose(entry->second, into);
}

char32_t composed(char32_t first, char32_t second) {
  if (first >= kLead && first < kLead + kLeads && second >= kVowel && second < kVowel + kVowels) {
    return kSyllable + ((first - kLead) * kVowels + second - kVowel) * kTails;
  }
  if (first >= kSyllable && first < kSyllable + kLeads * kVowels * kTails && (first - kSyllable) % kTails == 0 &&
      second > kTail && second < kTail + kTails) {
    return first + second - kTail;
  }
  static const std::map<std::pair<char32_t, char32_t>, char32_t> compositions = [] {
    std::map<std::pair<char32_t, char32_t>, char32_t> made;
    for (const Decomposition& entry : kDecompositions) {
      if (entry.composes != 0) made[{entry.first, entry.second}] = entry.code;
    }
    return made;
  }();
  const auto found = compositions.find({first, second});
  return found != compositions.end() ? found->second : 0;
}

int combining_class(char32_t code) {
  const CombiningClass* entry = range_of(kCombiningClasses, code);
  return entry != nullptr ? entry->number : 0;
}

}  // namespace edgeprune
