#include "text/pre_tokenizer.h"

#include <stdexcept>

#include "text/byte_level.h"
#include "text/pattern.h"
#include "text/sequence_parts.h"

namespace edgeprune {
namespace {

// GPT-2's, which ByteLevel uses.
constexpr const char* kWords = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Piece {
  size_t begin, end;
  bool matches;
};

template <typename Finder>
std::vector<Piece> matches_and_others(const Finder& finder, const CodePoints& text) {
  std::vector<Piece> pieces;
  size_t at = 0;
  while (const auto match = finder.find(text, at)) {
    if (match->first > at) pieces.push_back({at, match->first, false});
    pieces.push_back({match->first, match->second, true});
    at = match->second;
  }
  if (at < text.size()) pieces.push_back({at, text.size(), false});
  return pieces;
}

class SequencePreTokenizer : public PreTokenizer {
 public:
  explicit SequencePreTokenizer(const Json& list) : parts_(sequence_parts(list, pre_tokenizer_from_json)) {}
  std::vector<TracedText> cut(std::vector<TracedText> pieces) const override {
    for (const auto& part : parts_) pieces = part->cut(std::move(pieces));
    return pieces;
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> parts_;
};

class SplitPreTokenizer : public PreTokenizer {
 public:
  explicit SplitPreTokenizer(const Json& data)
      : pattern_(data.at("pattern")), invert_(data.at("invert").get<bool>()) {
    const std::string behavior = data.at("behavior").get<std::string>();
    if (behavior != "Isolated" && behavior != "Removed") {
      throw std::invalid_argument("its Split behavior '" + behavior + "' is not supported");
    }
    removed_ = behavior == "Removed";
  }
  std::vector<TracedText> cut(std::vector<TracedText> pieces) const override {
    std::vector<TracedText> parts;
    for (const TracedText& piece : pieces) {
      for (const auto& [begin, end, matches] : matches_and_others(pattern_, piece.codes)) {
        if (removed_ && matches != invert_) continue;
        parts.push_back(piece.part(begin, end));
      }
    }
    return parts;
  }

 private:
  Pattern pattern_;
  bool invert_;
  bool removed_ = false;
};

class ByteLevelPreTokenizer : public PreTokenizer {
 public:
  explicit ByteLevelPreTokenizer(const Json& data)
      : add_prefix_space_(data.at("add_prefix_space").get<bool>()),
        use_regex_(data.value("use_regex", true)),
        words_(kWords) {}
  std::vector<TracedText> cut(std::vector<TracedText> pieces) const override {
    std::vector<TracedText> parts;
    for (TracedText& piece : pieces) {
      if (add_prefix_space_ && !piece.starts_with(U" ")) piece.prepend(U" ");
      if (!use_regex_) {
        parts.push_back(in_bytes(piece));
        continue;
      }
      for (const auto& [begin, end, matches] : matches_and_others(words_, piece.codes)) {
        parts.push_back(in_bytes(piece.part(begin, end)));
      }
    }
    return parts;
  }

 private:
  static TracedText in_bytes(const TracedText& text) {
    TracedText bytes;
    for (size_t index = 0; index < text.codes.size(); ++index) {
      std::string encoded;
      append_utf8(encoded, text.codes[index]);
      for (const char byte : encoded) bytes.add(stand_in(static_cast<unsigned char>(byte)), text.spans[index]);
    }
    return bytes;
  }

  bool add_prefix_space_;
  bool use_regex_;
  Regex words_;
};

class MetaspacePreTokenizer : public PreTokenizer {
 public:
  explicit MetaspacePreTokenizer(const Json& data) : split_(data.value("split", true)) {
    replacement_ = code_points(data.at("replacement").get<std::string>());
    if (replacement_.size() != 1) throw std::invalid_argument("its Metaspace replacement is not one character");
    const std::string otherwise = data.value("add_prefix_space", true) ? "always" : "never";
    scheme_ = data.value("prepend_scheme", otherwise);
    if (scheme_ != "always" && scheme_ != "first" && scheme_ != "never") {
      throw std::invalid_argument("its Metaspace prepend_scheme '" + scheme_ + "' is not supported");
    }
  }
  std::vector<TracedText> cut(std::vector<TracedText> pieces) const override {
    std::vector<TracedText> parts;
    for (TracedText& piece : pieces) {
      for (char32_t& code : piece.codes) {
        if (code == ' ') code = replacement_.front();
      }
      const bool first = !piece.empty() && piece.spans.front().begin == 0;
      if ((scheme_ == "always" || (scheme_ == "first" && first)) && !piece.starts_with(replacement_)) {
        piece.prepend(replacement_);
      }
      // A replacement belongs to what follows it.
      size_t begin = 0;
      for (size_t at = 1; split_ && at < piece.codes.size(); ++at) {
        if (piece.codes[at] != replacement_.front()) continue;
        parts.push_back(piece.part(begin, at));
        begin = at;
      }
      if (begin < piece.codes.size()) parts.push_back(piece.part(begin, piece.codes.size()));
    }
    return parts;
  }

 private:
  CodePoints replacement_;
  std::string scheme_;
  bool split_;
};

}  // namespace

std::unique_ptr<PreTokenizer> pre_tokenizer_from_json(const Json& data) {
  if (data.is_null()) return nullptr;
  const std::string kind = data.at("type").get<std::string>();
  if (kind == "Sequence") return std::make_unique<SequencePreTokenizer>(data.at("pretokenizers"));
  if (kind == "Split") return std::make_unique<SplitPreTokenizer>(data);
  if (kind == "ByteLevel") return std::make_unique<ByteLevelPreTokenizer>(data);
  if (kind == "Metaspace") return std::make_unique<MetaspacePreTokenizer>(data);
  throw std::invalid_argument("its pre_tokenizer '" + kind + "' is not supported");
}

}  // namespace edgeprune
