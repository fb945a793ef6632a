#include "text/incremental_decoder.h"

#include "text/unicode.h"

namespace edgeprune {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::string IncrementalDecoder::push(int64_t id) {
  const std::string* token = tokenizer_->is_special(id) ? nullptr : tokenizer_->token_of(id);
  if (token == nullptr) return "";
  pending_.push_back(id);
  if (byte_of_token(*token) >= 0) return "";
  std::string text = pending_text();
  if (ends_with(text, "\xEF\xBF\xBD")) return "";
  return emit(std::move(text));
}

std::string IncrementalDecoder::finish() { return pending_.empty() ? "" : emit(pending_text()); }

std::string IncrementalDecoder::pending_text() const {
  const size_t before = count_code_points(tokenizer_->decode(context_));
  std::vector<int64_t> ids = context_;
  ids.insert(ids.end(), pending_.begin(), pending_.end());
  const std::string whole = tokenizer_->decode(ids);
  return std::string(skip_code_points(whole, before));
}

std::string IncrementalDecoder::emit(std::string text) {
  context_ = std::move(pending_);
  pending_.clear();
  return text;
}

}  // namespace edgeprune
