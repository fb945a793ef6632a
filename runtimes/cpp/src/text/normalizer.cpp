#include "text/normalizer.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "text/pattern.h"
#include "text/sequence_parts.h"

namespace edgeprune {
namespace {

class SequenceNormalizer : public Normalizer {
 public:
  explicit SequenceNormalizer(const Json& list) : parts_(sequence_parts(list, normalizer_from_json)) {}
  void apply(TracedText& text) const override {
    for (const auto& part : parts_) part->apply(text);
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> parts_;
};

// Canonical decomposition, canonical order, composition (Unicode, 3.11).
class NfcNormalizer : public Normalizer {
 public:
  void apply(TracedText& text) const override {
    if (std::all_of(text.codes.begin(), text.codes.end(), [](char32_t code) { return code < 0x300; })) return;
    const std::vector<Part> parts = ordered(text);
    std::vector<Part> done;
    std::ptrdiff_t starter = -1;
    for (const Part& part : parts) {
      const bool blocked = starter >= 0 && static_cast<size_t>(starter) + 1 < done.size() &&
                           (done.back().combining >= part.combining || done.back().combining == 0);
      const char32_t joined = starter >= 0 && !blocked ? composed(done[static_cast<size_t>(starter)].code, part.code) : 0;
      if (joined != 0) {
        done[static_cast<size_t>(starter)].code = joined;
        done[static_cast<size_t>(starter)].consumed += part.consumed;
        continue;
      }
      done.push_back(part);
      if (part.combining == 0) starter = static_cast<std::ptrdiff_t>(done.size()) - 1;
    }
    // Characters take the places of the original in order, even where marks changed theirs.
    TracedText normal;
    size_t next = 0;
    for (const Part& part : done) {
      normal.add(part.code, text.spans[part.consumed > 0 || next == 0 ? next : next - 1]);
      next += part.consumed;
    }
    text = std::move(normal);
  }

 private:
  struct Part {
    char32_t code;
    int combining;
    size_t consumed;  // characters of the original that it stands for
  };

  static std::vector<Part> ordered(const TracedText& text) {
    std::vector<Part> parts;
    for (const char32_t code : text.codes) {
      CodePoints pieces;
      decompose(code, pieces);
      for (size_t piece = 0; piece < pieces.size(); ++piece) {
        parts.push_back({pieces[piece], combining_class(pieces[piece]), piece == 0 ? size_t{1} : size_t{0}});
      }
    }
    for (auto begin = parts.begin(); begin != parts.end();) {
      if (begin->combining == 0) {
        ++begin;
        continue;
      }
      const auto end = std::find_if(begin, parts.end(), [](const Part& part) { return part.combining == 0; });
      std::stable_sort(begin, end, [](const Part& a, const Part& b) { return a.combining < b.combining; });
      begin = end;
    }
    return parts;
  }
};

class ReplaceNormalizer : public Normalizer {
 public:
  explicit ReplaceNormalizer(const Json& data)
      : pattern_(data.at("pattern")), content_(code_points(data.at("content").get<std::string>())) {}
  void apply(TracedText& text) const override {
    TracedText replaced;
    size_t at = 0;
    while (const auto match = pattern_.find(text.codes, at)) {
      for (; at < match->first; ++at) replaced.add(text.codes[at], text.spans[at]);
      for (const char32_t code : content_) replaced.add(code, text.spans[match->second - 1]);
      at = match->second;
    }
    for (; at < text.codes.size(); ++at) replaced.add(text.codes[at], text.spans[at]);
    text = std::move(replaced);
  }

 private:
  Pattern pattern_;
  CodePoints content_;
};

class LowercaseNormalizer : public Normalizer {
 public:
  void apply(TracedText& text) const override {
    TracedText lowered;
    for (size_t index = 0; index < text.codes.size(); ++index) {
      for (const char32_t code : lower_case(text.codes[index])) lowered.add(code, text.spans[index]);
    }
    text = std::move(lowered);
  }
};

class PrependNormalizer : public Normalizer {
 public:
  explicit PrependNormalizer(const Json& data) : front_(code_points(data.at("prepend").get<std::string>())) {}
  void apply(TracedText& text) const override { text.prepend(front_); }

 private:
  CodePoints front_;
};

}  // namespace

std::unique_ptr<Normalizer> normalizer_from_json(const Json& data) {
  if (data.is_null()) return nullptr;
  const std::string kind = data.at("type").get<std::string>();
  if (kind == "Sequence") return std::make_unique<SequenceNormalizer>(data.at("normalizers"));
  if (kind == "NFC") return std::make_unique<NfcNormalizer>();
  if (kind == "Replace") return std::make_unique<ReplaceNormalizer>(data);
  if (kind == "Lowercase") return std::make_unique<LowercaseNormalizer>();
  if (kind == "Prepend") return std::make_unique<PrependNormalizer>(data);
  throw std::invalid_argument("its normalizer '" + kind + "' is not supported");
}

}  // namespace edgeprune
