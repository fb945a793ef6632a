// The part of Oniguruma's regular expressions that tokenizers' pre-tokenizers use.
//
// Literals, classes with \p{L}, \p{N}, \s and their opposites, alternatives, groups, (?i:…), lookahead, and greedy or
// possessive repetition. Anything else is refused by name. Matching keeps its own stack, so that neither a long text
// nor a hostile pattern can overflow the program's.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "text/unicode.h"

namespace edgeprune {

struct RegexProgram;

class Regex {
 public:
  // Throws std::invalid_argument: what of the pattern is not supported.
  explicit Regex(const std::string& pattern);

  // First and last-plus-one character of the first match that is not empty, from `from` on.
  // Throws std::runtime_error: matching takes too many steps.
  std::optional<std::pair<size_t, size_t>> find(std::u32string_view text, size_t from) const;

 private:
  std::shared_ptr<const RegexProgram> program_;
};

}  // namespace edgeprune
