#include "text/byte_pair_model.h"

#include <array>
#include <queue>
#include <stdexcept>
#include <tuple>

#include "text/token_number.h"

namespace edgeprune {
namespace {

std::string byte_token(unsigned char byte) {
  static const char* digits = "0123456789ABCDEF";
  return std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">";
}

std::pair<std::string, std::string> merged_pair(const Json& entry) {
  if (entry.is_array() && entry.size() == 2) return {entry[0].get<std::string>(), entry[1].get<std::string>()};
  const auto& text = entry.get_ref<const std::string&>();
  const size_t space = text.find(' ');
  if (space == std::string::npos) throw std::invalid_argument("its merge '" + text + "' is not of two tokens");
  return {text.substr(0, space), text.substr(space + 1)};
}

std::string text_or_empty(const Json& data, const char* name) {
  return data.contains(name) && !data[name].is_null() ? data[name].get<std::string>() : "";
}

}  // namespace

BytePairModel::BytePairModel(const Json& data) {
  // Files of old versions of the tokenizers library have no type.
  const std::string kind = data.value("type", std::string("BPE"));
  if (kind != "BPE") throw std::invalid_argument("its model '" + kind + "' is not supported, only BPE is");
  if (data.contains("dropout") && !data["dropout"].is_null() && data["dropout"] != 0) {
    throw std::invalid_argument("its model drops merges at random, which is not supported");
  }
  if (!text_or_empty(data, "continuing_subword_prefix").empty()) {
    throw std::invalid_argument("its continuing_subword_prefix is not supported");
  }
  end_of_word_ = text_or_empty(data, "end_of_word_suffix");
  fuse_unknown_ = data.value("fuse_unk", false);
  byte_fallback_ = data.value("byte_fallback", false);
  ignore_merges_ = data.value("ignore_merges", false);
  const Json& vocabulary = data.at("vocab");
  const Json& merges = data.at("merges");
  ids_.reserve(vocabulary.size());
  tokens_.reserve(vocabulary.size());
  merges_.reserve(merges.size());
  for (const auto& [token, id] : vocabulary.items()) {
    const auto added = ids_.emplace(token, token_number(id, "its vocabulary gives '" + token + "' no usable id")).first;
    tokens_[added->second] = &added->first;
  }
  const std::string unknown = text_or_empty(data, "unk_token");
  if (!unknown.empty()) unknown_ = id_of(unknown);
  int64_t rank = 0;
  for (const Json& entry : merges) {
    const auto [left, right] = merged_pair(entry);
    const auto first = id_of(left), second = id_of(right), whole = id_of(left + right);
    if (!first || !second || !whole) {
      throw std::invalid_argument("its merge '" + left + " " + right + "' is not of tokens of its vocabulary");
    }
    merges_[key(*first, *second)] = {rank++, *whole};
  }
}

std::optional<int64_t> BytePairModel::id_of(const std::string& token) const {
  const auto found = ids_.find(token);
  return found != ids_.end() ? std::optional<int64_t>(found->second) : std::nullopt;
}

const std::string* BytePairModel::token_of(int64_t id) const {
  const auto found = tokens_.find(id);
  return found != tokens_.end() ? found->second : nullptr;
}

const BytePairModel::Merge* BytePairModel::merge_of(int64_t left, int64_t right) const {
  const auto found = merges_.find(key(left, right));
  return found != merges_.end() ? &found->second : nullptr;
}

std::vector<BytePairModel::Symbol> BytePairModel::symbols_of(const TracedText& piece) const {
  std::vector<Symbol> symbols;
  size_t at = 0;
  bool last_unknown = false;
  const auto add = [&](int64_t id, size_t begin, size_t end) {
    const auto index = static_cast<std::ptrdiff_t>(symbols.size());
    if (!symbols.empty()) symbols.back().next = index;
    symbols.push_back({id, begin, end, index - 1, -1});
  };
  for (size_t index = 0; index < piece.codes.size(); ++index) {
    std::string text;
    append_utf8(text, piece.codes[index]);
    const size_t begin = at;
    at += text.size();
    const std::string token = index + 1 == piece.codes.size() ? text + end_of_word_ : text;
    if (const auto id = id_of(token)) {
      add(*id, begin, at);
      last_unknown = false;
      continue;
    }
    if (byte_fallback_) {
      std::vector<int64_t> bytes;
      for (const char byte : token) {
        const auto id = id_of(byte_token(static_cast<unsigned char>(byte)));
        if (!id) break;
        bytes.push_back(*id);
      }
      if (bytes.size() == token.size()) {
        for (size_t byte = 0; byte < bytes.size(); ++byte) add(bytes[byte], begin + byte, begin + byte + 1);
        last_unknown = false;
        continue;
      }
    }
    if (!unknown_) continue;
    if (fuse_unknown_ && last_unknown) {
      symbols.back().end = at;
    } else {
      add(*unknown_, begin, at);
    }
    last_unknown = true;
  }
  return symbols;
}

void BytePairModel::merge(std::vector<Symbol>& symbols) const {
  // Lowest rank first, of equal ones the leftmost. An entry is stale when its symbols have changed.
  struct Candidate {
    int64_t rank;
    std::ptrdiff_t at;
    int64_t left, right, id;
    bool operator<(const Candidate& other) const { return std::tie(rank, at) > std::tie(other.rank, other.at); }
  };
  std::priority_queue<Candidate> candidates;
  const auto consider = [&](std::ptrdiff_t at) {
    if (at < 0) return;
    const Symbol& left = symbols[static_cast<size_t>(at)];
    if (left.next < 0) return;
    const Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (const Merge* found = merge_of(left.id, right.id)) candidates.push({found->rank, at, left.id, right.id, found->id});
  };
  for (size_t at = 0; at < symbols.size(); ++at) consider(static_cast<std::ptrdiff_t>(at));
  while (!candidates.empty()) {
    const Candidate best = candidates.top();
    candidates.pop();
    Symbol& left = symbols[static_cast<size_t>(best.at)];
    if (left.gone || left.id != best.left || left.next < 0) continue;
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.id != best.right) continue;
    left.id = best.id, left.end = right.end, left.next = right.next;
    right.gone = true;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.at;
    consider(left.previous);
    consider(best.at);
  }
}

void BytePairModel::encode(const TracedText& piece, std::vector<Token>& tokens) const {
  if (piece.empty()) return;
  if (ignore_merges_) {
    if (const auto id = id_of(utf8(piece.codes))) {
      tokens.push_back({*id, {piece.spans.front().begin, piece.spans.back().end}});
      return;
    }
  }
  std::vector<Symbol> symbols = symbols_of(piece);
  merge(symbols);
  std::vector<size_t> character_of_byte;
  for (size_t index = 0; index < piece.codes.size(); ++index) {
    std::string text;
    append_utf8(text, piece.codes[index]);
    character_of_byte.insert(character_of_byte.end(), text.size(), index);
  }
  for (const Symbol& symbol : symbols) {
    if (symbol.gone) continue;
    // A suffix in bytes lies behind the last character.
    const size_t last = std::min(symbol.end, character_of_byte.size()) - 1;
    const size_t first = std::min(symbol.begin, last);
    tokens.push_back({symbol.id,
                      {piece.spans[character_of_byte[first]].begin, piece.spans[character_of_byte[last]].end}});
  }
}

}  // namespace edgeprune
