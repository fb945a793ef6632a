#include "text/regex.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace edgeprune {
namespace {

enum class Property { letter, number, space };

struct ClassItem {
  char32_t first = 0, last = 0;
  bool is_property = false;
  Property property = Property::letter;
  bool negated = false;
};

struct CharacterSet {
  std::vector<ClassItem> items;
  bool negated = false;
  bool ignore_case = false;
};

char32_t folded(char32_t code) {
  if (code == 0x17F) return 's';  // the long s has no other lower case, but folds
  return lower_case(code).front();
}

bool has_property(Property property, char32_t code) {
  switch (property) {
    case Property::letter:
      return is_letter(code);
    case Property::number:
      return is_number(code);
    case Property::space:
      return is_space(code);
  }
  return false;
}

bool contains(const CharacterSet& set, char32_t code) {
  const char32_t compared = set.ignore_case ? folded(code) : code;
  const bool found = std::any_of(set.items.begin(), set.items.end(), [&](const ClassItem& item) {
    if (item.is_property) return has_property(item.property, code) != item.negated;
    return compared >= item.first && compared <= item.last;
  });
  return found != set.negated;
}

enum class Operation { set, split, jump, look, atomic, match };

constexpr size_t kMostInstructions = 20000;
constexpr size_t kMostSteps = 50'000'000;
constexpr int kDeepest = 50;
constexpr int kUnbounded = -1;

}  // namespace

struct Instruction {
  explicit Instruction(Operation kind, size_t to = 0, size_t otherwise = 0, bool not_so = false)
      : operation(kind), first(to), second(otherwise), negated(not_so) {}
  Operation operation;
  // split: tried first and second; jump: the first; look, atomic: where the part begins and what follows it.
  size_t first, second;
  bool negated;
  CharacterSet set;
};

struct RegexProgram {
  std::vector<Instruction> code;
};

namespace {

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("its regular expression has " + what + ", which is not supported");
}

struct Node {
  enum class Kind { set, sequence, alternatives, repeat, look };

  static Node of(Kind kind) {
    Node node;
    node.kind = kind;
    return node;
  }

  Kind kind = Kind::sequence;
  CharacterSet set;
  std::vector<Node> children;
  int least = 0, most = 0;
  bool possessive = false, negated = false;

  bool may_be_empty() const {
    const auto empty = [](const Node& child) { return child.may_be_empty(); };
    switch (kind) {
      case Kind::set:
        return false;
      case Kind::sequence:
        return std::all_of(children.begin(), children.end(), empty);
      case Kind::alternatives:
        return std::any_of(children.begin(), children.end(), empty);
      case Kind::repeat:
        return least == 0 || children.front().may_be_empty();
      case Kind::look:
        return true;
    }
    return true;
  }
};

class Parser {
 public:
  explicit Parser(const std::string& pattern) : pattern_(code_points(pattern)) {}

  Node parse() {
    Node node = alternatives(0, false);
    if (at_ < pattern_.size()) refuse("a ) without (");
    return node;
  }

 private:
  bool next_is(char32_t code, size_t ahead = 0) const {
    return at_ + ahead < pattern_.size() && pattern_[at_ + ahead] == code;
  }
  bool accept(std::u32string_view text) {
    if (pattern_.compare(at_, text.size(), text) != 0) return false;
    at_ += text.size();
    return true;
  }
  char32_t take() {
    if (at_ >= pattern_.size()) refuse("no end");
    return pattern_[at_++];
  }

  Node alternatives(int depth, bool ignore_case) {
    if (depth > kDeepest) refuse("too many groups in groups");
    Node node = Node::of(Node::Kind::alternatives);
    node.children.push_back(sequence(depth, ignore_case));
    while (accept(U"|")) node.children.push_back(sequence(depth, ignore_case));
    if (node.children.size() > 1) return node;
    Node only = std::move(node.children.front());
    return only;
  }

  Node sequence(int depth, bool ignore_case) {
    Node node = Node::of(Node::Kind::sequence);
    while (at_ < pattern_.size() && !next_is('|') && !next_is(')')) {
      node.children.push_back(repeated(atom(depth, ignore_case)));
    }
    return node;
  }

  Node repeated(Node child) {
    int least = 1, most = 1;
    if (accept(U"?")) {
      least = 0;
    } else if (accept(U"*")) {
      least = 0, most = kUnbounded;
    } else if (accept(U"+")) {
      most = kUnbounded;
    } else if (next_is('{')) {
      ++at_;
      least = number();
      most = accept(U",") ? (next_is('}') ? kUnbounded : number()) : least;
      if (!accept(U"}") || (most != kUnbounded && most < least)) refuse("a count that is no {n,m}");
    } else {
      return child;
    }
    if (next_is('?')) refuse("a lazy repetition");
    if (most == kUnbounded && child.may_be_empty()) refuse("an unbounded repetition of what may be empty");
    Node node = Node::of(Node::Kind::repeat);
    node.children.push_back(std::move(child));
    node.least = least, node.most = most;
    node.possessive = accept(U"+");
    return node;
  }

  int number() {
    int value = 0;
    if (at_ >= pattern_.size() || pattern_[at_] < '0' || pattern_[at_] > '9') refuse("a count that is no {n,m}");
    while (at_ < pattern_.size() && pattern_[at_] >= '0' && pattern_[at_] <= '9') {
      value = 10 * value + static_cast<int>(take() - '0');
      if (value > 1000) refuse("a count above 1000");
    }
    return value;
  }

  Node atom(int depth, bool ignore_case) {
    const char32_t code = take();
    if (code == '(') return group(depth, ignore_case);
    if (code == '[') return character_class(ignore_case);
    if (code == '*' || code == '+' || code == '?') refuse("a repetition of nothing");
    if (code == '^' || code == '$' || code == '.') refuse("'" + utf8(CodePoints{code}) + "'");
    Node node = Node::of(Node::Kind::set);
    node.set.ignore_case = ignore_case;
    node.set.items.push_back(code == '\\' ? escape() : literal(code));
    fold(node.set);
    return node;
  }

  Node group(int depth, bool ignore_case) {
    Node node = Node::of(Node::Kind::look);
    if (accept(U"?!") || accept(U"?=")) {
      const bool negated = pattern_[at_ - 1] == '!';
      node.children.push_back(alternatives(depth + 1, ignore_case));
      node.negated = negated;
    } else {
      if (accept(U"?i:")) {
        ignore_case = true;
      } else if (!accept(U"?:") && next_is('?')) {
        refuse("a group that begins with (?" + (at_ + 1 < pattern_.size() ? utf8(CodePoints{pattern_[at_ + 1]}) : ""));
      }
      node = alternatives(depth + 1, ignore_case);
    }
    if (!accept(U")")) refuse("a ( without )");
    return node;
  }

  Node character_class(bool ignore_case) {
    Node node = Node::of(Node::Kind::set);
    node.set.ignore_case = ignore_case;
    node.set.negated = accept(U"^");
    do {
      const char32_t code = take();
      if (code == '[' || (code == '&' && next_is('&'))) refuse("a class in a class");
      ClassItem item = code == '\\' ? escape() : literal(code);
      if (next_is('-') && !next_is(']', 1)) {
        ++at_;
        const char32_t end = take();
        const ClassItem last = end == '\\' ? escape() : literal(end);
        if (item.is_property || last.is_property || last.first < item.first) refuse("a range without ends");
        item.last = last.first;
      }
      node.set.items.push_back(item);
    } while (!next_is(']'));
    ++at_;
    fold(node.set);
    return node;
  }

  static ClassItem literal(char32_t code) { return {code, code}; }

  static void fold(CharacterSet& set) {
    if (!set.ignore_case) return;
    for (ClassItem& item : set.items) {
      if (item.is_property) continue;
      if (item.first != item.last) refuse("a range without case");
      item.first = item.last = folded(item.first);
    }
  }

  ClassItem escape() {
    const char32_t code = take();
    switch (code) {
      case 'r':
        return literal('\r');
      case 'n':
        return literal('\n');
      case 't':
        return literal('\t');
      case 's':
      case 'S':
        return {0, 0, true, Property::space, code == 'S'};
      case 'p':
      case 'P': {
        const bool negated = code == 'P';
        if (accept(U"{L}")) return {0, 0, true, Property::letter, negated};
        if (accept(U"{N}")) return {0, 0, true, Property::number, negated};
        refuse("a property other than \\p{L} and \\p{N}");
      }
      default:
        if (code >= 0x80 || is_letter(code) || is_number(code)) refuse("'\\" + utf8(CodePoints{code}) + "'");
        return literal(code);
    }
  }

  CodePoints pattern_;
  size_t at_ = 0;
};

class Emitter {
 public:
  RegexProgram emit_program(const Node& node) {
    emit(node);
    add(Instruction(Operation::match));
    return std::move(program_);
  }

 private:
  size_t here() const { return program_.code.size(); }

  size_t add(Instruction instruction) {
    if (here() >= kMostInstructions) refuse("too many repetitions");
    program_.code.push_back(std::move(instruction));
    return here() - 1;
  }

  void emit(const Node& node) {
    switch (node.kind) {
      case Node::Kind::set: {
        Instruction instruction{Operation::set};
        instruction.set = node.set;
        add(std::move(instruction));
        break;
      }
      case Node::Kind::sequence:
        for (const Node& child : node.children) emit(child);
        break;
      case Node::Kind::alternatives:
        emit_alternatives(node);
        break;
      case Node::Kind::repeat:
        if (node.possessive) {
          emit_part(Operation::atomic, false, [&] { emit_repeat(node); });
        } else {
          emit_repeat(node);
        }
        break;
      case Node::Kind::look:
        emit_part(Operation::look, node.negated, [&] { emit(node.children.front()); });
        break;
    }
  }

  void emit_alternatives(const Node& node) {
    std::vector<size_t> exits;
    for (size_t index = 0; index < node.children.size(); ++index) {
      const bool last = index + 1 == node.children.size();
      const size_t split = last ? 0 : add(Instruction(Operation::split, here() + 1));
      emit(node.children[index]);
      if (last) break;
      exits.push_back(add(Instruction(Operation::jump)));
      program_.code[split].second = here();
    }
    for (const size_t exit : exits) program_.code[exit].first = here();
  }

  void emit_repeat(const Node& node) {
    const Node& child = node.children.front();
    for (int count = 0; count < node.least; ++count) emit(child);
    if (node.most == kUnbounded) {
      const size_t split = add(Instruction(Operation::split, here() + 1));
      emit(child);
      add(Instruction(Operation::jump, split));
      program_.code[split].second = here();
      return;
    }
    std::vector<size_t> splits;
    for (int count = node.least; count < node.most; ++count) {
      splits.push_back(add(Instruction(Operation::split, here() + 1)));
      emit(child);
    }
    for (const size_t split : splits) program_.code[split].second = here();
  }

  // A part that is matched on its own; it ends with its own match.
  template <typename Body>
  void emit_part(Operation operation, bool negated, Body body) {
    const size_t start = add(Instruction(operation, here() + 1, 0, negated));
    body();
    add(Instruction(Operation::match));
    program_.code[start].second = here();
  }

  RegexProgram program_;
};

class Matcher {
 public:
  Matcher(const RegexProgram& program, std::u32string_view text) : code_(program.code), text_(text) {}

  // Where the match ends that begins at `at`. Recurs only as deep as lookaheads and possessive parts lie in each other.
  std::optional<size_t> match(size_t pc, size_t at) {
    std::vector<std::pair<size_t, size_t>> later;
    while (true) {
      if (++steps_ > kMostSteps) throw std::runtime_error("the tokenizer's regular expression takes too long");
      const Instruction& instruction = code_[pc];
      bool failed = false;
      switch (instruction.operation) {
        case Operation::match:
          return at;
        case Operation::set:
          failed = at >= text_.size() || !contains(instruction.set, text_[at]);
          ++pc, ++at;
          break;
        case Operation::split:
          later.emplace_back(instruction.second, at);
          pc = instruction.first;
          break;
        case Operation::jump:
          pc = instruction.first;
          break;
        case Operation::look:
          failed = match(instruction.first, at).has_value() == instruction.negated;
          pc = instruction.second;
          break;
        case Operation::atomic: {
          const std::optional<size_t> end = match(instruction.first, at);
          failed = !end.has_value();
          if (end) at = *end;
          pc = instruction.second;
          break;
        }
      }
      if (!failed) continue;
      if (later.empty()) return std::nullopt;
      std::tie(pc, at) = later.back();
      later.pop_back();
    }
  }

 private:
  const std::vector<Instruction>& code_;
  std::u32string_view text_;
  size_t steps_ = 0;
};

}  // namespace

Regex::Regex(const std::string& pattern)
    : program_(std::make_shared<RegexProgram>(Emitter().emit_program(Parser(pattern).parse()))) {}

std::optional<std::pair<size_t, size_t>> Regex::find(std::u32string_view text, size_t from) const {
  Matcher matcher(*program_, text);
  for (size_t start = from; start < text.size(); ++start) {
    const std::optional<size_t> end = matcher.match(0, start);
    if (end && *end > start) return std::make_pair(start, *end);
  }
  return std::nullopt;
}

}  // namespace edgeprune
