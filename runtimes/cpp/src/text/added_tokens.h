// Tokens that are found in a text before the model sees it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "bundle/json_object.h"
#include "text/normalizer.h"
#include "text/traced_text.h"

namespace edgeprune {

struct AddedToken {
  int64_t id = 0;
  std::string content;
  CodePoints searched;  // the content, normalized where the token is looked for in normalized text
  bool single_word = false, lstrip = false, rstrip = false, normalized = false, special = false;
};

class AddedTokens {
 public:
  // Of the list "added_tokens". Throws std::invalid_argument.
  AddedTokens(const Json& list, const Normalizer* normalizer);

  struct Piece {
    TracedText text;
    const AddedToken* token;  // null for text between tokens
  };
  // Cuts a text at the tokens that are looked for in normalized, or in unnormalized text.
  std::vector<Piece> cut(const TracedText& text, bool normalized) const;

  const AddedToken* by_id(int64_t id) const;
  const AddedToken* by_content(const std::string& content) const;

 private:
  const AddedToken* longest_at(const CodePoints& text, size_t at, bool normalized) const;

  std::vector<AddedToken> tokens_;
  // By first character, the longest first.
  std::map<char32_t, std::vector<size_t>> by_first_[2];
  std::unordered_map<int64_t, size_t> by_id_;
  std::unordered_map<std::string, size_t> by_content_;
};

}  // namespace edgeprune
