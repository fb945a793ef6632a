// Cuts a stream of text at the first of several stop texts.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace edgeprune {

// Text that may be the beginning of a stop text is withheld until it is decided.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stop) : stop_(std::move(stop)) {}

  // The text that is safe to emit, and whether a stop text was met; everything after it is ignored.
  std::pair<std::string, bool> push(const std::string& piece);
  // The text still withheld when generation ends without a stop text.
  std::string finish();

 private:
  std::vector<std::string> stop_;
  std::string withheld_;
  bool finished_ = false;
};

}  // namespace edgeprune
