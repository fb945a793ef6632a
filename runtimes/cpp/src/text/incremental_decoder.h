// From token ids to text while they are generated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace edgeprune {

// The pieces together are what the tokenizer makes of all ids, without the special ones. A piece is withheld while it
// may still change: inside a character, and inside a run of byte tokens, which SentencePiece decodes as a whole.
class IncrementalDecoder {
 public:
  explicit IncrementalDecoder(const Tokenizer& tokenizer) : tokenizer_(&tokenizer) {}

  // Adds a token; returns the text that is certain by now.
  std::string push(int64_t id);
  // The text still withheld at the end of the answer.
  std::string finish();

 private:
  std::string pending_text() const;
  std::string emit(std::string text);

  const Tokenizer* tokenizer_;
  std::vector<int64_t> context_;  // ids of the last piece: what follows a piece decides about its spaces
  std::vector<int64_t> pending_;
};

}  // namespace edgeprune
