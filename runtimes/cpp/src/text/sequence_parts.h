// The parts of a tokenizer's component of type Sequence.
#pragma once

#include <memory>
#include <stdexcept>
#include <vector>

#include "bundle/json_object.h"

namespace edgeprune {

// Null stands for no component elsewhere; in a Sequence it is an error. Throws std::invalid_argument.
template <typename Part>
std::vector<std::unique_ptr<Part>> sequence_parts(const Json& list, std::unique_ptr<Part> (*read)(const Json&)) {
  std::vector<std::unique_ptr<Part>> parts;
  for (const Json& entry : list) {
    parts.push_back(read(entry));
    if (parts.back() == nullptr) throw std::invalid_argument("a part of its Sequence is null");
  }
  return parts;
}

}  // namespace edgeprune
