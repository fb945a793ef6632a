#include "text/post_processor.h"

#include <algorithm>
#include <stdexcept>

#include "text/byte_level.h"
#include "text/sequence_parts.h"
#include "text/token_number.h"
#include "text/unicode.h"

namespace edgeprune {
namespace {

int64_t special_id(const Json& value) { return token_number(value, "its post_processor names no usable id"); }

// Takes spaces out of the offsets that byte-level tokens have.
void trim(std::vector<Token>& tokens, const std::vector<std::string>& texts, bool add_prefix_space) {
  const auto is_blank = [](char32_t code) { return code == stand_in(' ') || is_space(code); };
  for (size_t index = 0; index < tokens.size(); ++index) {
    const CodePoints text = code_points(texts[index]);
    Span& span = tokens[index].span;
    auto front = std::find_if_not(text.begin(), text.end(), is_blank) - text.begin();
    const auto back = std::find_if_not(text.rbegin(), text.rend(), is_blank) - text.rbegin();
    if (front > 0) {
      if (add_prefix_space && (index == 0 || span.begin == 0)) --front;
      span.begin = std::min(span.begin + front, span.end);
    }
    if (back > 0 && span.end >= back) span.end = std::max(span.end - back, span.begin);
  }
}

class ByteLevelProcessor : public PostProcessor {
 public:
  explicit ByteLevelProcessor(const Json& data)
      : trims_(data.at("trim_offsets").get<bool>()), add_prefix_space_(data.at("add_prefix_space").get<bool>()) {}
  void process(std::vector<Token>& tokens, std::vector<std::string>& texts, bool) const override {
    if (trims_) trim(tokens, texts, add_prefix_space_);
  }

 private:
  bool trims_, add_prefix_space_;
};

class RobertaProcessor : public PostProcessor {
 public:
  explicit RobertaProcessor(const Json& data)
      : trims_(data.at("trim_offsets").get<bool>()),
        add_prefix_space_(data.at("add_prefix_space").get<bool>()),
        first_(special_id(data.at("cls").at(1))),
        last_(special_id(data.at("sep").at(1))) {}
  void process(std::vector<Token>& tokens, std::vector<std::string>& texts, bool add_special) const override {
    if (trims_) trim(tokens, texts, add_prefix_space_);
    if (!add_special) return;
    tokens.insert(tokens.begin(), Token{first_, {}});
    tokens.push_back({last_, {}});
    texts.insert(texts.begin(), "");
    texts.emplace_back();
  }

 private:
  bool trims_, add_prefix_space_;
  int64_t first_, last_;
};

class TemplateProcessor : public PostProcessor {
 public:
  explicit TemplateProcessor(const Json& data) {
    std::vector<int64_t>* side = &before_;
    for (const Json& part : data.at("single")) {
      if (part.contains("Sequence")) {
        if (side == &after_ || part["Sequence"].at("id") != "A") {
          throw std::invalid_argument("its post_processor's template is not of one text");
        }
        side = &after_;
        continue;
      }
      const std::string name = part.at("SpecialToken").at("id").get<std::string>();
      for (const Json& id : data.at("special_tokens").at(name).at("ids")) side->push_back(special_id(id));
    }
    if (side == &before_) throw std::invalid_argument("its post_processor's template is not of one text");
  }
  void process(std::vector<Token>& tokens, std::vector<std::string>& texts, bool add_special) const override {
    if (!add_special) return;
    std::vector<Token> whole;
    for (const int64_t id : before_) whole.push_back({id, {}});
    whole.insert(whole.end(), tokens.begin(), tokens.end());
    for (const int64_t id : after_) whole.push_back({id, {}});
    tokens = std::move(whole);
    texts.insert(texts.begin(), before_.size(), "");
    texts.insert(texts.end(), after_.size(), "");
  }

 private:
  std::vector<int64_t> before_, after_;
};

class SequenceProcessor : public PostProcessor {
 public:
  explicit SequenceProcessor(const Json& list) : parts_(sequence_parts(list, post_processor_from_json)) {}
  void process(std::vector<Token>& tokens, std::vector<std::string>& texts, bool add_special) const override {
    for (const auto& part : parts_) part->process(tokens, texts, add_special);
  }

 private:
  std::vector<std::unique_ptr<PostProcessor>> parts_;
};

}  // namespace

std::unique_ptr<PostProcessor> post_processor_from_json(const Json& data) {
  if (data.is_null()) return nullptr;
  const std::string kind = data.at("type").get<std::string>();
  if (kind == "TemplateProcessing") return std::make_unique<TemplateProcessor>(data);
  if (kind == "RobertaProcessing") return std::make_unique<RobertaProcessor>(data);
  if (kind == "ByteLevel") return std::make_unique<ByteLevelProcessor>(data);
  if (kind == "Sequence") return std::make_unique<SequenceProcessor>(data.at("processors"));
  throw std::invalid_argument("its post_processor '" + kind + "' is not supported");
}

}  // namespace edgeprune
