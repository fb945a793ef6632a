// From a question to token ids.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/bundle.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace edgeprune {

// How a model wants to be asked; the fields of edgeprune.runtimes.prompt.PromptFormat.
struct PromptFormat {
  std::string chat_template;
  std::string image_token;
  int64_t image_token_id = 0;
  std::map<std::string, std::string> special_tokens;
  std::vector<int64_t> eos_token_ids;
  int64_t context_length = 0;
  std::string image_prefix;
  std::string image_suffix;

  // Throws BundleError: a field is unknown, missing or invalid.
  static PromptFormat from_json(const Json& data);
};

struct EncodedPrompt {
  std::vector<Token> tokens;
  std::string tail;         // the text after the last picture
  int64_t tail_start = 0;   // its first character
  int64_t num_tail_rows = 0;

  std::vector<int64_t> ids() const;
  // First and last-plus-one character in `tail` of each token after the last picture.
  std::vector<Span> tail_spans() const;
};

class PromptEncoder {
 public:
  // `built_for` is the most rows that the backend's graphs take, none where the context alone limits a prompt.
  // Throws BundleError: the format or the tokenizer is unusable.
  explicit PromptEncoder(const Bundle& bundle, std::optional<int64_t> built_for = std::nullopt);

  const PromptFormat& format() const { return format_; }
  const Tokenizer& tokenizer() const { return tokenizer_; }

  // Puts a question about pictures into the chat template; the pictures come before the text, unless the prompt says
  // with placeholders where they are. Throws PromptError.
  std::string render(const std::string& prompt, size_t num_images) const;
  // Expands the placeholders of a rendered prompt and tokenizes it. Throws PromptError.
  EncodedPrompt encode(const std::string& rendered, const std::vector<int64_t>& tokens_per_image, int64_t max_new_tokens) const;

 private:
  void check(const EncodedPrompt& encoded, int64_t num_visual, int64_t max_new_tokens) const;

  PromptFormat format_;
  std::optional<int64_t> built_for_;
  Tokenizer tokenizer_;
  ChatTemplate template_;
};

// Of a file of the bundle. Throws BundleError.
Tokenizer read_tokenizer(const Bundle& bundle, const FileEntry& file);

}  // namespace edgeprune
