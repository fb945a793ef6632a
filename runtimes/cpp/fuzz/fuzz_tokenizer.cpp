// A tokenizer.json on the first line, behind it a text: read and tokenized, or refused; what is tokenized is decoded, too.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "json_mutation.h"
#include "text/incremental_decoder.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

void check(bool holds) {
  if (!holds) std::abort();
}

void encode_and_decode(const edgeprune::Tokenizer& tokenizer, const std::string& text) {
  const auto length = static_cast<int64_t>(edgeprune::count_code_points(text));
  std::vector<int64_t> ids;
  for (const edgeprune::Token& token : tokenizer.encode(text, true)) {
    check(0 <= token.span.begin && token.span.begin <= token.span.end && token.span.end <= length);
    ids.push_back(token.id);
  }
  edgeprune::IncrementalDecoder decoder(tokenizer);
  std::string pieces;
  for (const int64_t id : ids) pieces += decoder.push(id);
  pieces += decoder.finish();
  check(edgeprune::is_utf8(pieces));
  check(edgeprune::is_utf8(tokenizer.decode(ids)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const uint8_t* end = std::find(data, data + size, '\n');
  const std::string text(end == data + size ? end : end + 1, data + size);
  try {
    const edgeprune::Tokenizer tokenizer(std::string(data, end));
    if (edgeprune::is_utf8(text)) encode_and_decode(tokenizer, text);
  } catch (const std::invalid_argument&) {
    // What every file gets that is no tokenizer that the library reads.
  } catch (const std::runtime_error& error) {
    // A regular expression that does not end.
    check(std::string(error.what()).find("too long") != std::string::npos);
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  edgeprune::fuzz::Random random(seed);
  const uint8_t* end = std::find(data, data + size, '\n');
  const uint8_t* last = data + size;
  std::string json(static_cast<const uint8_t*>(data), end), text(end, last);
  if (edgeprune::fuzz::below(2, random) == 0) {
    json = edgeprune::fuzz::mutated_json(json, random);
  } else {
    edgeprune::fuzz::mutate_text(text, 16);
  }
  const std::string changed = json + text;
  if (changed.size() > most) return LLVMFuzzerMutate(data, size, most);
  std::copy(changed.begin(), changed.end(), data);
  return changed.size();
}
