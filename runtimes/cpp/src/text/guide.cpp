#include "text/guide.h"

#include <algorithm>

#include "error.h"

namespace edgeprune {
namespace {

constexpr const char* kStartToken = "<|startoftext|>";
constexpr const char* kEndToken = "<|endoftext|>";

}  // namespace

GuideEncoder::GuideEncoder(const Bundle& bundle, const FileEntry& file, int64_t context_length)
    : tokenizer_(read_tokenizer(bundle, file)), context_length_(context_length) {
  const auto start = tokenizer_.id_of(kStartToken), end = tokenizer_.id_of(kEndToken);
  if (!start || !end) {
    throw BundleError(bundle.file(file).string() + " has no " + kStartToken + " and " + kEndToken + ": it is not CLIP's tokenizer");
  }
  start_ = *start, end_ = *end;
}

GuideInputs GuideEncoder::encode(const EncodedPrompt& prompt) const {
  const std::vector<Token> tokens = tokenizer_.encode(prompt.tail, false);
  const int64_t room = context_length_ - 2;
  const int64_t num_chunks = std::max<int64_t>(1, (static_cast<int64_t>(tokens.size()) + room - 1) / room);
  const auto width = static_cast<size_t>(num_chunks * context_length_);
  std::vector<int64_t> ids(width, end_);
  std::vector<Span> spans(width);
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) ids[static_cast<size_t>(chunk * context_length_)] = start_;
  for (size_t index = 0; index < tokens.size(); ++index) {
    const auto number = static_cast<int64_t>(index);
    const auto place = static_cast<size_t>(number / room * context_length_ + number % room + 1);
    ids[place] = tokens[index].id;
    spans[place] = tokens[index].span;
  }
  std::vector<float> map;
  for (const Span& row : prompt.tail_spans()) {
    std::vector<bool> overlaps;
    for (const Span& span : spans) overlaps.push_back(std::min(span.end, row.end) > std::max(span.begin, row.begin));
    const auto count = std::max<std::ptrdiff_t>(1, std::count(overlaps.begin(), overlaps.end(), true));
    for (const bool overlap : overlaps) map.push_back(static_cast<float>((overlap ? 1.0 : 0.0) / static_cast<double>(count)));
  }
  const auto num_rows = static_cast<int64_t>(width == 0 ? 0 : map.size() / width);
  return {int64_tensor(ids, {num_chunks, context_length_}), float32_tensor(map, {num_rows, static_cast<int64_t>(width)})};
}

}  // namespace edgeprune
