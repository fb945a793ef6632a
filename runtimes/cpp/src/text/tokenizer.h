// A tokenizer.json of the Hugging Face tokenizers library: byte-pair encoding with what the supported families put
// around it. A component that is not known is refused by name when the file is read.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "text/added_tokens.h"
#include "text/byte_pair_model.h"
#include "text/normalizer.h"
#include "text/post_processor.h"
#include "text/pre_tokenizer.h"
#include "text/token_decoder.h"

namespace edgeprune {

class Tokenizer {
 public:
  // Of the file's text; settings of truncation and padding are left out.
  // Throws std::invalid_argument: what is wrong or not supported.
  explicit Tokenizer(const std::string& json_text);

  // Tokens with their characters in `text`, which is valid UTF-8.
  std::vector<Token> encode(const std::string& text, bool add_special_tokens) const;
  // The text of tokens, without the special ones.
  std::string decode(const std::vector<int64_t>& ids) const;

  std::optional<int64_t> id_of(const std::string& token) const;
  // Null if there is none.
  const std::string* token_of(int64_t id) const;
  bool is_special(int64_t id) const;

 private:
  explicit Tokenizer(const Json& data);

  std::unique_ptr<Normalizer> normalizer_;
  std::unique_ptr<PreTokenizer> pre_tokenizer_;
  BytePairModel model_;
  std::unique_ptr<PostProcessor> post_processor_;
  std::unique_ptr<TokenDecoder> decoder_;
  AddedTokens added_;
};

}  // namespace edgeprune
