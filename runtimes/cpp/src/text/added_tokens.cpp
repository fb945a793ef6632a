#include "text/added_tokens.h"

#include <algorithm>
#include <stdexcept>

#include "text/token_number.h"

namespace edgeprune {
namespace {

bool is_word(char32_t code) { return is_letter(code) || is_number(code) || code == '_'; }

}  // namespace

AddedTokens::AddedTokens(const Json& list, const Normalizer* normalizer) {
  for (const Json& data : list) {
    AddedToken token;
    token.content = data.at("content").get<std::string>();
    token.id = token_number(data.at("id"), "its added token '" + token.content + "' has no usable id");
    token.single_word = data.value("single_word", false);
    token.lstrip = data.value("lstrip", false);
    token.rstrip = data.value("rstrip", false);
    token.special = data.value("special", false);
    token.normalized = data.value("normalized", !token.special);
    if (token.content.empty()) continue;
    TracedText searched = TracedText::of(code_points(token.content), 0);
    if (token.normalized && normalizer != nullptr) normalizer->apply(searched);
    token.searched = searched.codes;
    tokens_.push_back(std::move(token));
  }
  for (size_t index = 0; index < tokens_.size(); ++index) {
    const AddedToken& token = tokens_[index];
    by_id_[token.id] = index;
    by_content_[token.content] = index;
    if (!token.searched.empty()) by_first_[token.normalized ? 1 : 0][token.searched.front()].push_back(index);
  }
  for (auto& by_first : by_first_) {
    for (auto& [code, indices] : by_first) {
      std::stable_sort(indices.begin(), indices.end(), [&](size_t a, size_t b) {
        return tokens_[a].searched.size() > tokens_[b].searched.size();
      });
    }
  }
}

const AddedToken* AddedTokens::longest_at(const CodePoints& text, size_t at, bool normalized) const {
  const auto& by_first = by_first_[normalized ? 1 : 0];
  const auto found = by_first.find(text[at]);
  if (found == by_first.end()) return nullptr;
  for (const size_t index : found->second) {
    const CodePoints& searched = tokens_[index].searched;
    if (text.compare(at, searched.size(), searched) == 0) return &tokens_[index];
  }
  return nullptr;
}

std::vector<AddedTokens::Piece> AddedTokens::cut(const TracedText& text, bool normalized) const {
  std::vector<Piece> pieces;
  size_t done = 0, at = 0;
  while (at < text.codes.size()) {
    const AddedToken* token = longest_at(text.codes, at, normalized);
    if (token == nullptr) {
      ++at;
      continue;
    }
    size_t begin = at, end = at + token->searched.size();
    at = end;
    if (token->single_word && ((begin > 0 && is_word(text.codes[begin - 1])) ||
                               (end < text.codes.size() && is_word(text.codes[end])))) {
      continue;
    }
    while (token->lstrip && begin > done && is_space(text.codes[begin - 1])) --begin;
    while (token->rstrip && end < text.codes.size() && is_space(text.codes[end])) ++end;
    at = std::max(at, end);
    if (begin > done) pieces.push_back({text.part(done, begin), nullptr});
    pieces.push_back({text.part(begin, end), token});
    done = end;
  }
  if (done < text.codes.size()) pieces.push_back({text.part(done, text.codes.size()), nullptr});
  return pieces;
}

const AddedToken* AddedTokens::by_id(int64_t id) const {
  const auto found = by_id_.find(id);
  return found != by_id_.end() ? &tokens_[found->second] : nullptr;
}

const AddedToken* AddedTokens::by_content(const std::string& content) const {
  const auto found = by_content_.find(content);
  return found != by_content_.end() ? &tokens_[found->second] : nullptr;
}

}  // namespace edgeprune
