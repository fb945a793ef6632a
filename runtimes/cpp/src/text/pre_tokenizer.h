// The "pre_tokenizer" of a tokenizer.json: Sequence, Split, ByteLevel, Metaspace.
#pragma once

#include <memory>
#include <vector>

#include "bundle/json_object.h"
#include "text/traced_text.h"

namespace edgeprune {

class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  // Cuts every piece into pieces; none of them is empty.
  virtual std::vector<TracedText> cut(std::vector<TracedText> pieces) const = 0;
};

// Null for null. Throws std::invalid_argument: a kind that is not supported, by name.
std::unique_ptr<PreTokenizer> pre_tokenizer_from_json(const Json& data);

}  // namespace edgeprune
