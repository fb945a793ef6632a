// The "post_processor" of a tokenizer.json, of one text: TemplateProcessing, RobertaProcessing, ByteLevel, Sequence.
#pragma once

#include <memory>
#include <vector>

#include "bundle/json_object.h"
#include "text/byte_pair_model.h"

namespace edgeprune {

class PostProcessor {
 public:
  virtual ~PostProcessor() = default;
  // `texts` are the tokens themselves, in step with `tokens`; the special ones of a template have no text.
  virtual void process(std::vector<Token>& tokens, std::vector<std::string>& texts, bool add_special) const = 0;
};

// Null for null. Throws std::invalid_argument: a kind that is not supported, by name.
std::unique_ptr<PostProcessor> post_processor_from_json(const Json& data);

}  // namespace edgeprune
