#include "text/token_decoder.h"

#include <cctype>
#include <stdexcept>

#include "text/byte_level.h"
#include "text/pattern.h"
#include "text/sequence_parts.h"
#include "text/token_number.h"
#include "text/unicode.h"

namespace edgeprune {
namespace {

using Tokens = std::vector<std::string>;

class SequenceDecoder : public TokenDecoder {
 public:
  explicit SequenceDecoder(const Json& list) : parts_(sequence_parts(list, token_decoder_from_json)) {}
  Tokens decode(Tokens tokens) const override {
    for (const auto& part : parts_) tokens = part->decode(std::move(tokens));
    return tokens;
  }

 private:
  std::vector<std::unique_ptr<TokenDecoder>> parts_;
};

class ByteLevelDecoder : public TokenDecoder {
 public:
  Tokens decode(Tokens tokens) const override {
    std::string bytes;
    for (const std::string& token : tokens) bytes += bytes_of(token);
    return {utf8_lossy(bytes)};
  }

 private:
  // A token with a character that stands for no byte is text.
  static std::string bytes_of(const std::string& token) {
    std::string bytes;
    for (const char32_t code : code_points(token)) {
      const auto byte = byte_of_stand_in(code);
      if (!byte) return token;
      bytes += static_cast<char>(*byte);
    }
    return bytes;
  }
};

class ReplaceDecoder : public TokenDecoder {
 public:
  explicit ReplaceDecoder(const Json& data)
      : pattern_(data.at("pattern")), content_(code_points(data.at("content").get<std::string>())) {}
  Tokens decode(Tokens tokens) const override {
    for (std::string& token : tokens) {
      const CodePoints text = code_points(token);
      CodePoints replaced;
      size_t at = 0;
      while (const auto match = pattern_.find(text, at)) {
        replaced += text.substr(at, match->first - at) + content_;
        at = match->second;
      }
      if (at > 0) token = utf8(replaced + text.substr(at));
    }
    return tokens;
  }

 private:
  Pattern pattern_;
  CodePoints content_;
};

class ByteFallbackDecoder : public TokenDecoder {
 public:
  Tokens decode(Tokens tokens) const override {
    Tokens pieces;
    std::string bytes;
    const auto flush = [&] {
      if (is_utf8(bytes)) {
        if (!bytes.empty()) pieces.push_back(bytes);
      } else {
        pieces.insert(pieces.end(), bytes.size(), "\xEF\xBF\xBD");
      }
      bytes.clear();
    };
    for (std::string& token : tokens) {
      const int byte = byte_of_token(token);
      if (byte >= 0) {
        bytes += static_cast<char>(byte);
        continue;
      }
      flush();
      pieces.push_back(std::move(token));
    }
    flush();
    return pieces;
  }
};

class FuseDecoder : public TokenDecoder {
 public:
  Tokens decode(Tokens tokens) const override {
    std::string whole;
    for (const std::string& token : tokens) whole += token;
    return {whole};
  }
};

size_t num_stripped(const Json& value) {
  return static_cast<size_t>(token_number(value, "its Strip says no usable number of characters"));
}

class StripDecoder : public TokenDecoder {
 public:
  explicit StripDecoder(const Json& data)
      : content_(code_points(data.at("content").get<std::string>())),
        start_(num_stripped(data.at("start"))),
        stop_(num_stripped(data.at("stop"))) {
    if (content_.size() != 1) throw std::invalid_argument("its Strip content is not one character");
  }
  Tokens decode(Tokens tokens) const override {
    for (std::string& token : tokens) {
      CodePoints text = code_points(token);
      size_t front = 0, back = 0;
      while (front < start_ && front < text.size() && text[front] == content_.front()) ++front;
      while (back < stop_ && back < text.size() - front && text[text.size() - 1 - back] == content_.front()) ++back;
      if (front + back > 0) token = utf8(text.substr(front, text.size() - front - back));
    }
    return tokens;
  }

 private:
  CodePoints content_;
  size_t start_, stop_;
};

class MetaspaceDecoder : public TokenDecoder {
 public:
  explicit MetaspaceDecoder(const Json& data) : replacement_(code_points(data.at("replacement").get<std::string>())) {
    if (replacement_.size() != 1) throw std::invalid_argument("its Metaspace replacement is not one character");
    const std::string otherwise = data.value("add_prefix_space", true) ? "always" : "never";
    prepends_ = data.value("prepend_scheme", otherwise) != "never";
  }
  Tokens decode(Tokens tokens) const override {
    for (size_t index = 0; index < tokens.size(); ++index) {
      CodePoints text;
      for (const char32_t code : code_points(tokens[index])) {
        if (code != replacement_.front()) {
          text += code;
        } else if (index > 0 || !prepends_) {
          text += U' ';
        }
      }
      tokens[index] = utf8(text);
    }
    return tokens;
  }

 private:
  CodePoints replacement_;
  bool prepends_ = true;
};

}  // namespace

int byte_of_token(const std::string& token) {
  if (token.size() != 6 || token.compare(0, 3, "<0x") != 0 || token[5] != '>') return -1;
  if (std::isxdigit(static_cast<unsigned char>(token[3])) == 0 || std::isxdigit(static_cast<unsigned char>(token[4])) == 0) {
    return -1;
  }
  return std::stoi(token.substr(3, 2), nullptr, 16);
}

std::unique_ptr<TokenDecoder> token_decoder_from_json(const Json& data) {
  if (data.is_null()) return nullptr;
  const std::string kind = data.at("type").get<std::string>();
  if (kind == "Sequence") return std::make_unique<SequenceDecoder>(data.at("decoders"));
  if (kind == "ByteLevel") return std::make_unique<ByteLevelDecoder>();
  if (kind == "Replace") return std::make_unique<ReplaceDecoder>(data);
  if (kind == "ByteFallback") return std::make_unique<ByteFallbackDecoder>();
  if (kind == "Fuse") return std::make_unique<FuseDecoder>();
  if (kind == "Strip") return std::make_unique<StripDecoder>(data);
  if (kind == "Metaspace") return std::make_unique<MetaspaceDecoder>(data);
  throw std::invalid_argument("its decoder '" + kind + "' is not supported");
}

}  // namespace edgeprune
