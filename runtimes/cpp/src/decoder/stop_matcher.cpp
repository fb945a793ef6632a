#include "decoder/stop_matcher.h"

#include <algorithm>

namespace edgeprune {
namespace {

// Length of the longest end of `text` that is a proper beginning of `stop`.
size_t overlap(const std::string& text, const std::string& stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.compare(text.size() - length, length, stop, 0, length) == 0) return length;
  }
  return 0;
}

}  // namespace

std::pair<std::string, bool> StopMatcher::push(const std::string& piece) {
  if (finished_) return {"", true};
  const std::string text = withheld_ + piece;
  // The one that is complete first counts, so that the answer does not depend on where the pieces break.
  size_t first_end = std::string::npos, begin = std::string::npos;
  for (const std::string& stop : stop_) {
    const size_t at = text.find(stop);
    if (at == std::string::npos) continue;
    const size_t end = at + stop.size();
    if (end < first_end || (end == first_end && at < begin)) first_end = end, begin = at;
  }
  if (begin != std::string::npos) {
    finished_ = true;
    withheld_.clear();
    return {text.substr(0, begin), true};
  }
  size_t length = 0;
  for (const std::string& stop : stop_) length = std::max(length, overlap(text, stop));
  withheld_ = text.substr(text.size() - length);
  return {text.substr(0, text.size() - length), false};
}

std::string StopMatcher::finish() {
  finished_ = true;
  return std::exchange(withheld_, "");
}

}  // namespace edgeprune
