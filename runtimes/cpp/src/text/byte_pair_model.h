// Byte-pair encoding: the "model" of a tokenizer.json of type BPE.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "bundle/json_object.h"
#include "text/traced_text.h"

namespace edgeprune {

struct Token {
  int64_t id = 0;
  Span span;
};

class BytePairModel {
 public:
  // Throws std::invalid_argument: another model, or a merge of what is no token.
  explicit BytePairModel(const Json& data);

  // Appends the tokens of one piece.
  void encode(const TracedText& piece, std::vector<Token>& tokens) const;
  std::optional<int64_t> id_of(const std::string& token) const;
  // Null if there is none.
  const std::string* token_of(int64_t id) const;

 private:
  struct Symbol {
    int64_t id;
    size_t begin, end;  // bytes of the piece
    std::ptrdiff_t previous, next;
    bool gone = false;
  };
  struct Merge {
    int64_t rank, id;
  };
  struct PairHash {
    size_t operator()(uint64_t pair) const { return static_cast<size_t>(pair * 0x9E3779B97F4A7C15u); }
  };

  std::vector<Symbol> symbols_of(const TracedText& piece) const;
  void merge(std::vector<Symbol>& symbols) const;
  const Merge* merge_of(int64_t left, int64_t right) const;
  static uint64_t key(int64_t left, int64_t right) {
    return static_cast<uint64_t>(left) << 32 | static_cast<uint64_t>(right);
  }

  std::unordered_map<std::string, int64_t> ids_;
  std::unordered_map<int64_t, const std::string*> tokens_;
  std::unordered_map<uint64_t, Merge, PairHash> merges_;
  std::optional<int64_t> unknown_;
  std::string end_of_word_;
  bool fuse_unknown_ = false;
  bool byte_fallback_ = false;
  bool ignore_merges_ = false;
};

}  // namespace edgeprune
