// Numbers in a tokenizer.json: ids, and how many of something.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bundle/json_object.h"

namespace edgeprune {

// An integer from 0 to 2^31 - 1. `refusal` is the sentence for anything else. Throws std::invalid_argument.
inline int64_t token_number(const Json& value, const std::string& refusal) {
  constexpr uint64_t kLargest = (uint64_t{1} << 31) - 1;
  // What is written without a sign, a fraction or an exponent.
  if (!value.is_number_unsigned() || value.get<uint64_t>() > kLargest) throw std::invalid_argument(refusal);
  return value.get<int64_t>();
}

}  // namespace edgeprune
