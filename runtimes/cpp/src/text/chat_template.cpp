#include "text/chat_template.h"

#include <algorithm>
#include <ctime>
#include <nlohmann/json.hpp>

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-variable"
#pragma GCC diagnostic ignored "-Wpedantic"
#endif
#include <minja/minja.hpp>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include "error.h"
#include "text/deep_stack.h"

namespace edgeprune {
namespace {

// minja reads templates recursively and with std::regex, which recurs by character.
constexpr size_t kLongestTemplate = 64 << 10;
constexpr size_t kStackBytes = size_t{256} << 20;

// Brackets in brackets inside of tags; parsing takes longer than their number, and recurs.
constexpr int kDeepestBrackets = 50;

bool is_nested_too_deeply(const std::string& source) {
  int depth = 0;
  for (size_t at = 0; at < source.size(); ++at) {
    const char sign = source[at];
    const char next = at + 1 < source.size() ? source[at + 1] : '\0';
    if (sign == '{' && (next == '{' || next == '%' || next == '#')) depth = 0;
    if (sign == '(' || sign == '[' || sign == '{') ++depth;
    if (sign == ')' || sign == ']' || sign == '}') depth = std::max(0, depth - 1);
    if (depth > kDeepestBrackets) return true;
  }
  return false;
}

std::string first_line(const char* message) {
  const std::string text = message;
  return text.substr(0, std::min<size_t>(text.find('\n'), 300));
}

minja::Value bounded_range(const std::shared_ptr<minja::Context>& context, minja::ArgumentsValue& arguments) {
  // Jinja's sandbox knows the same bound.
  constexpr int64_t kMost = 100000;
  for (const minja::Value& value : arguments.args) {
    const int64_t bound = value.is_number_integer() ? value.get<int64_t>() : kMost + 1;
    if (bound < -kMost || bound > kMost) throw std::runtime_error("range too big");
  }
  return minja::Context::builtins()->get("range").call(context, arguments);
}

}  // namespace

struct ChatTemplate::Parsed {
  std::shared_ptr<minja::TemplateNode> root;
};

ChatTemplate::ChatTemplate(const std::string& source) : parsed_(std::make_unique<Parsed>()) {
  if (source.size() > kLongestTemplate) {
    throw BundleError("the chat template is longer than " + std::to_string(kLongestTemplate) + " bytes: export the bundle again");
  }
  if (is_nested_too_deeply(source)) {
    throw BundleError("the chat template has brackets nested deeper than " + std::to_string(kDeepestBrackets) +
                      ": export the bundle again");
  }
  std::string failure;
  on_deep_stack(kStackBytes, [&] {
    try {
      parsed_->root = minja::Parser::parse(source, {true, true, false});
    } catch (const std::exception& error) {
      failure = first_line(error.what());
    }
  });
  if (!failure.empty()) throw BundleError("the chat template is not valid Jinja (" + failure + "): export the bundle again");
}

ChatTemplate::~ChatTemplate() = default;

std::string ChatTemplate::render(size_t num_images, const std::string& prompt,
                                 const std::map<std::string, std::string>& special_tokens) const {
  nlohmann::ordered_json content = nlohmann::ordered_json::array();
  for (size_t index = 0; index < num_images; ++index) content.push_back({{"type", "image"}});
  content.push_back({{"type", "text"}, {"text", prompt}});
  nlohmann::ordered_json names = {{"messages", {{{"role", "user"}, {"content", content}}}},
                                  {"tools", nullptr},
                                  {"documents", nullptr},
                                  {"add_generation_prompt", true}};
  for (const auto& [name, text] : special_tokens) names[name] = text;
  std::string text, failure;
  on_deep_stack(kStackBytes, [&] {
    try {
      const auto context = minja::Context::make(minja::Value(names), minja::Context::builtins());
      context->set("range", minja::Value::callable(bounded_range));
      context->set("strftime_now", minja::Value::callable([](const std::shared_ptr<minja::Context>&, minja::ArgumentsValue& arguments) {
        arguments.expectArgs("strftime_now", {1, 1}, {0, 0});
        const std::time_t now = std::time(nullptr);
        std::tm local{};
        localtime_r(&now, &local);
        char formatted[256];
        const size_t length = std::strftime(formatted, sizeof formatted, arguments.args[0].get<std::string>().c_str(), &local);
        return minja::Value(std::string(formatted, length));
      }));
      text = parsed_->root->render(context);
    } catch (const std::exception& error) {
      failure = first_line(error.what());
      if (failure.empty()) failure = "unknown error";
    }
  });
  if (!failure.empty()) {
    throw PromptError("the model's chat template refuses the prompt (" + failure +
                      "): ask in another form, or export the checkpoint with a template for messages with pictures");
  }
  return text;
}

}  // namespace edgeprune
