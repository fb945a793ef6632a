// Text that knows which characters of the original each of its characters came from.
#pragma once

#include <cstdint>
#include <vector>

#include "text/unicode.h"

namespace edgeprune {

// First and last-plus-one character.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;
};

struct TracedText {
  CodePoints codes;
  std::vector<Span> spans;  // one per character

  static TracedText of(const CodePoints& codes, int64_t first) {
    TracedText text{codes, {}};
    text.spans.reserve(codes.size());
    for (size_t index = 0; index < codes.size(); ++index) {
      const int64_t begin = first + static_cast<int64_t>(index);
      text.spans.push_back({begin, begin + 1});
    }
    return text;
  }
  TracedText part(size_t begin, size_t end) const {
    const auto at = [&](size_t index) { return spans.begin() + static_cast<std::ptrdiff_t>(index); };
    return {codes.substr(begin, end - begin), {at(begin), at(end)}};
  }
  void add(char32_t code, Span span) {
    codes += code;
    spans.push_back(span);
  }
  // Text in front belongs to the first character.
  void prepend(const CodePoints& front) {
    if (codes.empty()) return;
    codes.insert(0, front);
    spans.insert(spans.begin(), front.size(), spans.front());
  }
  bool starts_with(const CodePoints& front) const { return codes.compare(0, front.size(), front) == 0; }
  bool empty() const { return codes.empty(); }
};

}  // namespace edgeprune
