#include "text/prompt.h"

#include <algorithm>
#include <numeric>

#include "error.h"
#include "pictures/preprocessing.h"

namespace edgeprune {
namespace {

constexpr int64_t kLongestContext = int64_t{1} << 24;
// The placeholder of a video in Qwen's tokenizers; no graph takes one.
const std::string kVideoToken = "<|video_pad|>";

[[noreturn]] void refuse(const char* name, const std::string& expected, const Json& value) {
  throw BundleError(std::string("prompt format ") + name + " must be " + expected + ", not " + value.dump());
}

std::string text_field(const Json& data, const char* name, bool may_be_empty, const std::string& expected = "a text") {
  const Json& value = data[name];
  if (!value.is_string() || (!may_be_empty && value.get<std::string>().empty())) refuse(name, expected, value);
  return value.get<std::string>();
}

bool is_id(const Json& value) {
  return value.is_number_integer() && value.get<int64_t>() >= 0 && value.get<int64_t>() < (int64_t{1} << 31);
}

size_t count(const std::string& text, const std::string& part) {
  size_t found = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++found;
  return found;
}

// Python's str.strip() leaves nothing.
bool is_blank(const std::string& text) {
  const CodePoints codes = code_points(text);
  return std::all_of(codes.begin(), codes.end(), [](char32_t code) { return is_space(code) || (code >= 0x1C && code <= 0x1F); });
}

std::string without(std::string text, const std::string& part) {
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at)) text.erase(at, part.size());
  return text;
}

}  // namespace

PromptFormat PromptFormat::from_json(const Json& data) {
  check_setting_names(data, "prompt format",
                      {"chat_template", "image_token", "image_token_id", "special_tokens", "bos_token_id", "eos_token_ids",
                       "pad_token_id", "context_length", "image_prefix", "image_suffix"});
  PromptFormat format;
  format.chat_template = text_field(data, "chat_template", false);
  format.image_token = text_field(data, "image_token", false);
  if (!is_id(data["image_token_id"])) refuse("image_token_id", "a token id", data["image_token_id"]);
  format.image_token_id = data["image_token_id"].get<int64_t>();
  const Json& special = data["special_tokens"];
  if (!special.is_object()) refuse("special_tokens", "names with their texts", special);
  for (const auto& [name, text] : special.items()) {
    if (!text.is_string()) refuse("special_tokens", "names with their texts", special);
    format.special_tokens[name] = text.get<std::string>();
  }
  for (const char* name : {"bos_token_id", "pad_token_id"}) {
    if (!data[name].is_null() && !is_id(data[name])) refuse(name, "a token id or null", data[name]);
  }
  const Json& ends = data["eos_token_ids"];
  if (!ends.is_array() || !std::all_of(ends.begin(), ends.end(), is_id)) refuse("eos_token_ids", "a list of token ids", ends);
  for (const Json& id : ends) format.eos_token_ids.push_back(id.get<int64_t>());
  const Json& length = data["context_length"];
  if (!is_id(length) || length.get<int64_t>() == 0 || length.get<int64_t>() > kLongestContext) {
    refuse("context_length", "a positive integer", length);
  }
  format.context_length = length.get<int64_t>();
  for (const auto& [name, text] : {std::make_pair("image_prefix", &format.image_prefix), std::make_pair("image_suffix", &format.image_suffix)}) {
    *text = text_field(data, name, true, "a text without the image token");
    if (text->find(format.image_token) != std::string::npos) refuse(name, "a text without the image token", data[name]);
  }
  return format;
}

std::vector<int64_t> EncodedPrompt::ids() const {
  std::vector<int64_t> ids;
  for (const Token& token : tokens) ids.push_back(token.id);
  return ids;
}

std::vector<Span> EncodedPrompt::tail_spans() const {
  const auto length = static_cast<int64_t>(count_code_points(tail));
  const auto inside = [&](int64_t place) { return std::clamp<int64_t>(place - tail_start, 0, length); };
  std::vector<Span> spans;
  for (size_t row = tokens.size() - static_cast<size_t>(num_tail_rows); row < tokens.size(); ++row) {
    spans.push_back({inside(tokens[row].span.begin), inside(tokens[row].span.end)});
  }
  return spans;
}

Tokenizer read_tokenizer(const Bundle& bundle, const FileEntry& file) {
  try {
    return Tokenizer(bundle.text(file));
  } catch (const std::invalid_argument& error) {
    throw BundleError(bundle.file(file).string() + " is not a tokenizer that edgeprune's library reads (" + error.what() +
                      "): export the bundle again");
  }
}

PromptEncoder::PromptEncoder(const Bundle& bundle, std::optional<int64_t> built_for)
    : format_(PromptFormat::from_json(bundle.manifest().prompt)),
      built_for_(built_for),
      tokenizer_(read_tokenizer(bundle, bundle.manifest().tokenizer)),
      template_(format_.chat_template) {
  const std::optional<int64_t> id = tokenizer_.id_of(format_.image_token);
  if (id != format_.image_token_id) {
    throw BundleError(bundle.file(bundle.manifest().tokenizer).string() + " gives '" + format_.image_token + "' the id " +
                      (id ? std::to_string(*id) : "None") + ", the manifest " + std::to_string(format_.image_token_id) +
                      ": export the bundle again");
  }
}

std::string PromptEncoder::render(const std::string& prompt, size_t num_images) const {
  const std::string& image_token = format_.image_token;
  if (!is_utf8(prompt)) throw PromptError("the prompt holds halves of characters: decode it as UTF-8 before asking");
  if (is_blank(without(prompt, image_token))) throw PromptError("the prompt is empty: write a question about the picture");
  if (count(prompt, kVideoToken) != 0 && tokenizer_.id_of(kVideoToken)) {
    throw PromptError("the prompt has '" + kVideoToken +
                      "', the placeholder of a video: ask about pictures, such as some of its frames");
  }
  const size_t placeholders = count(prompt, image_token);
  if (placeholders != 0 && placeholders != num_images) {
    throw PromptError("the prompt has " + std::to_string(placeholders) + " placeholders '" + image_token + "' for " +
                      std::to_string(num_images) +
                      " pictures: write one for each picture, or none to put the pictures before the text");
  }
  const std::string text = template_.render(num_images - placeholders, prompt, format_.special_tokens);
  const size_t written = count(text, image_token);
  if (written != num_images) {
    throw PromptError("the model's chat template wrote " + std::to_string(written) + " placeholders for " +
                      std::to_string(num_images) + " pictures: write '" + image_token +
                      "' into the prompt where each picture belongs");
  }
  return text;
}

EncodedPrompt PromptEncoder::encode(const std::string& rendered, const std::vector<int64_t>& tokens_per_image,
                                    int64_t max_new_tokens) const {
  const std::string& image_token = format_.image_token;
  // More visual tokens than the context holds are refused below; they need not be written out.
  const int64_t num_visual = std::accumulate(tokens_per_image.begin(), tokens_per_image.end(), int64_t{0});
  std::string head;
  size_t at = 0;
  for (const int64_t number : tokens_per_image) {
    const size_t placeholder = rendered.find(image_token, at);
    if (placeholder == std::string::npos) break;
    head += rendered.substr(at, placeholder - at) + format_.image_prefix;
    for (int64_t written = 0; written < std::min(number, format_.context_length + 1); ++written) head += image_token;
    head += format_.image_suffix;
    at = placeholder + image_token.size();
  }
  EncodedPrompt encoded;
  encoded.tail = rendered.substr(at);
  encoded.tail_start = static_cast<int64_t>(count_code_points(head));
  const auto bos = format_.special_tokens.find("bos_token");
  // A template that writes the first special token itself does not get a second one.
  const bool has_bos = bos != format_.special_tokens.end() && rendered.compare(0, bos->second.size(), bos->second) == 0;
  encoded.tokens = tokenizer_.encode(head + encoded.tail, !has_bos);
  for (auto token = encoded.tokens.rbegin(); token != encoded.tokens.rend() && token->id != format_.image_token_id; ++token) {
    ++encoded.num_tail_rows;
  }
  check(encoded, num_visual, max_new_tokens);
  return encoded;
}

void PromptEncoder::check(const EncodedPrompt& encoded, int64_t num_visual, int64_t max_new_tokens) const {
  const auto num_rows = static_cast<int64_t>(encoded.tokens.size());
  const auto found = std::count_if(encoded.tokens.begin(), encoded.tokens.end(),
                                   [&](const Token& token) { return token.id == format_.image_token_id; });
  if (found != num_visual && num_rows + max_new_tokens <= format_.context_length) {
    throw PromptError(std::to_string(num_visual) + " visual tokens became " + std::to_string(found) + " in the tokenizer: keep '" +
                      format_.image_token + "' apart from other special tokens in the prompt");
  }
  if (num_rows == 0) throw PromptError("the prompt is empty: write a question about the picture");
  if (num_visual > 0 && encoded.num_tail_rows == 0) {
    throw PromptError("the prompt ends with a picture: put the question after the last picture");
  }
  // Visual tokens that were not written out count, too.
  const int64_t rows = num_rows + num_visual - found;
  const bool by_engines = built_for_ && *built_for_ < format_.context_length;
  const int64_t limit = by_engines ? *built_for_ : format_.context_length;
  const int64_t excess = rows + max_new_tokens - limit;
  if (excess > 0) {
    throw PromptError("the prompt's " + std::to_string(rows) + " tokens (" + std::to_string(num_visual) + " of them visual) and " +
                      std::to_string(max_new_tokens) + " new ones exceed " +
                      (by_engines ? "what the engines were built for, " : "the context of ") + std::to_string(limit) + " by " +
                      std::to_string(excess) + ": shorten the text, give fewer pictures or lower max_new_tokens" +
                      (by_engines ? ", or build with a larger --max-sequence" : ""));
  }
}

}  // namespace edgeprune
