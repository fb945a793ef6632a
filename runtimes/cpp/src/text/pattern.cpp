#include "text/pattern.h"

#include <stdexcept>

namespace edgeprune {

Pattern::Pattern(const Json& data) {
  if (data.is_object() && data.size() == 1 && data.contains("String")) {
    literal_ = code_points(data["String"].get<std::string>());
  } else if (data.is_object() && data.size() == 1 && data.contains("Regex")) {
    regex_.emplace(data["Regex"].get<std::string>());
  } else {
    throw std::invalid_argument("its pattern is neither a String nor a Regex");
  }
}

std::optional<std::pair<size_t, size_t>> Pattern::find(std::u32string_view text, size_t from) const {
  if (regex_) return regex_->find(text, from);
  const size_t at = literal_->empty() ? std::u32string_view::npos : text.find(*literal_, from);
  if (at == std::u32string_view::npos) return std::nullopt;
  return std::make_pair(at, at + literal_->size());
}

}  // namespace edgeprune
