// What a tokenizer.json calls a pattern: a text or a regular expression.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "bundle/json_object.h"
#include "text/regex.h"

namespace edgeprune {

class Pattern {
 public:
  // Of {"String": …} or {"Regex": …}. Throws std::invalid_argument.
  explicit Pattern(const Json& data);
  // The next match that is not empty, as first and last-plus-one character.
  std::optional<std::pair<size_t, size_t>> find(std::u32string_view text, size_t from) const;
  // The text that is looked for; none for a regular expression.
  const std::optional<CodePoints>& literal() const { return literal_; }

 private:
  std::optional<CodePoints> literal_;
  std::optional<Regex> regex_;
};

}  // namespace edgeprune
