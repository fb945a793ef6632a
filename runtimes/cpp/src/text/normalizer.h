// The "normalizer" of a tokenizer.json: Sequence, NFC, Replace, Lowercase, Prepend.
#pragma once

#include <memory>

#include "bundle/json_object.h"
#include "text/traced_text.h"

namespace edgeprune {

class Normalizer {
 public:
  virtual ~Normalizer() = default;
  virtual void apply(TracedText& text) const = 0;
};

// Null for null. Throws std::invalid_argument: a kind that is not supported, by name.
std::unique_ptr<Normalizer> normalizer_from_json(const Json& data);

}  // namespace edgeprune
