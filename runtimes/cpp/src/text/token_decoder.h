// The "decoder" of a tokenizer.json: Sequence, ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bundle/json_object.h"

namespace edgeprune {

class TokenDecoder {
 public:
  virtual ~TokenDecoder() = default;
  // Tokens to pieces of text.
  virtual std::vector<std::string> decode(std::vector<std::string> tokens) const = 0;
};

// Null for null. Throws std::invalid_argument: a kind that is not supported, by name.
std::unique_ptr<TokenDecoder> token_decoder_from_json(const Json& data);

// The byte of a token such as "<0x0A>"; -1 of any other.
int byte_of_token(const std::string& token);

}  // namespace edgeprune
