#include "text/tokenizer.h"

#include <stdexcept>

namespace edgeprune {
namespace {

const Json& part(const Json& data, const char* name) {
  static const Json nothing;
  if (!data.is_object()) throw std::invalid_argument("it is no object");
  return data.contains(name) ? data[name] : nothing;
}

Json parsed(const std::string& text) {
  const Json data = parse_json(text);
  if (!part(data, "model").is_object()) throw std::invalid_argument("it has no model");
  return data;
}

}  // namespace

Tokenizer::Tokenizer(const std::string& json_text) try : Tokenizer(parsed(json_text)) {
} catch (const Json::exception& error) {
  throw std::invalid_argument(error.what());
}

Tokenizer::Tokenizer(const Json& data)
    : normalizer_(normalizer_from_json(part(data, "normalizer"))),
      pre_tokenizer_(pre_tokenizer_from_json(part(data, "pre_tokenizer"))),
      model_(part(data, "model")),
      post_processor_(post_processor_from_json(part(data, "post_processor"))),
      decoder_(token_decoder_from_json(part(data, "decoder"))),
      added_(part(data, "added_tokens").is_null() ? Json::array() : part(data, "added_tokens"), normalizer_.get()) {}

std::vector<Token> Tokenizer::encode(const std::string& text, bool add_special_tokens) const {
  std::vector<Token> tokens;
  const auto add = [&](const AddedTokens::Piece& piece) {
    tokens.push_back({piece.token->id, {piece.text.spans.front().begin, piece.text.spans.back().end}});
  };
  for (AddedTokens::Piece& outer : added_.cut(TracedText::of(code_points(text), 0), false)) {
    if (outer.token != nullptr) {
      add(outer);
      continue;
    }
    if (normalizer_) normalizer_->apply(outer.text);
    for (AddedTokens::Piece& inner : added_.cut(outer.text, true)) {
      if (inner.token != nullptr) {
        add(inner);
        continue;
      }
      std::vector<TracedText> pieces = {std::move(inner.text)};
      if (pre_tokenizer_) pieces = pre_tokenizer_->cut(std::move(pieces));
      for (const TracedText& piece : pieces) model_.encode(piece, tokens);
    }
  }
  if (post_processor_) {
    std::vector<std::string> texts;
    for (const Token& token : tokens) texts.push_back(*token_of(token.id));
    post_processor_->process(tokens, texts, add_special_tokens);
  }
  return tokens;
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) const {
  std::vector<std::string> tokens;
  for (const int64_t id : ids) {
    const std::string* token = token_of(id);
    if (token != nullptr && !is_special(id)) tokens.push_back(*token);
  }
  std::string text;
  if (!decoder_) {
    for (const std::string& token : tokens) text += (text.empty() ? "" : " ") + token;
    return text;
  }
  for (const std::string& piece : decoder_->decode(std::move(tokens))) text += piece;
  return text;
}

std::optional<int64_t> Tokenizer::id_of(const std::string& token) const {
  if (const AddedToken* added = added_.by_content(token)) return added->id;
  return model_.id_of(token);
}

const std::string* Tokenizer::token_of(int64_t id) const {
  if (const AddedToken* added = added_.by_id(id)) return &added->content;
  return model_.token_of(id);
}

bool Tokenizer::is_special(int64_t id) const {
  const AddedToken* added = added_.by_id(id);
  return added != nullptr && added->special;
}

}  // namespace edgeprune
