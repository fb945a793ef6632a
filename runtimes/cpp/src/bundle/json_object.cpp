#include "bundle/json_object.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace edgeprune {
namespace {

constexpr int kDeepest = 64;

std::string shown(const Json& value) {
  std::string text = value.is_string() ? value.get<std::string>()
                                       : value.dump(-1, ' ', false, Json::error_handler_t::replace);
  // Not through a character's bytes.
  size_t end = std::min<size_t>(text.size(), 60);
  while (end < text.size() && end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return "'" + text.substr(0, end) + "'";
}

// Of what is JSON up to there.
bool is_nested_too_deeply(const std::string& text) {
  int depth = 0;
  bool in_string = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char sign = text[at];
    if (in_string) {
      if (sign == '\\') ++at;
      if (sign == '"') in_string = false;
    } else if (sign == '"') {
      in_string = true;
    } else if (sign == '[' || sign == '{') {
      if (++depth > kDeepest) return true;
    } else if (sign == ']' || sign == '}') {
      --depth;
    }
  }
  return false;
}

}  // namespace

Json parse_json(const std::string& text) {
  // Beforehand: a parser that reports every value takes twice as long.
  if (is_nested_too_deeply(text)) throw std::invalid_argument("nested too deeply");
  try {
    return Json::parse(text);
  } catch (const Json::exception& error) {
    throw std::invalid_argument(error.what());
  }
}

void refuse_json(const std::string& where, const Json& value, const std::string& expected) {
  throw BundleError(where + " is " + shown(value) + ", expected " + expected);
}

JsonObject::JsonObject(const Json& data, std::string where, const std::vector<const char*>& required,
                       const std::vector<const char*>& optional)
    : data_(&data), where_(std::move(where)) {
  if (!data.is_object()) refuse_json(where_, data, "an object");
  const auto among = [](const std::vector<const char*>& names, const std::string& name) {
    return std::any_of(names.begin(), names.end(), [&](const char* known) { return name == known; });
  };
  for (const auto& [name, value] : data.items()) {
    if (!among(required, name) && !among(optional, name)) {
      throw BundleError(where_ + " has an unknown field '" + name + "'");
    }
  }
  for (const char* name : required) {
    if (!data.contains(name)) throw BundleError(where_ + " lacks the field '" + name + "'");
  }
}

std::string JsonObject::text(const char* name) const {
  const Json& value = any(name);
  if (!value.is_string()) refuse_json(where(name), value, "str");
  return value.get<std::string>();
}

bool JsonObject::flag(const char* name) const {
  const Json& value = any(name);
  if (!value.is_boolean()) refuse_json(where(name), value, "bool");
  return value.get<bool>();
}

namespace {

int64_t integer_of(const Json& value, const std::string& where) {
  if (!value.is_number_integer()) refuse_json(where, value, "int");
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    refuse_json(where, value, "int");
  }
  return value.get<int64_t>();
}

}  // namespace

int64_t JsonObject::integer(const char* name) const { return integer_of(any(name), where(name)); }

double JsonObject::number(const char* name) const {
  const Json& value = any(name);
  if (!value.is_number() || !std::isfinite(value.get<double>())) refuse_json(where(name), value, "float");
  return value.get<double>();
}

std::optional<int64_t> JsonObject::optional_integer(const char* name) const {
  if (is_null(name)) return std::nullopt;
  return integer(name);
}

std::optional<double> JsonObject::optional_number(const char* name) const {
  if (is_null(name)) return std::nullopt;
  return number(name);
}

std::vector<int64_t> JsonObject::integers(const char* name) const {
  std::vector<int64_t> numbers;
  const Json& values = list(name);
  for (size_t index = 0; index < values.size(); ++index) {
    numbers.push_back(integer_of(values[index], where(name) + "[" + std::to_string(index) + "]"));
  }
  return numbers;
}

const Json& JsonObject::list(const char* name) const {
  const Json& value = any(name);
  if (!value.is_array()) refuse_json(where(name), value, "a list");
  return value;
}

const Json& JsonObject::object(const char* name) const {
  const Json& value = any(name);
  if (!value.is_object()) refuse_json(where(name), value, "an object");
  return value;
}

}  // namespace edgeprune
