// A JSON object whose fields are known beforehand: nothing unknown, nothing missing, every type checked.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

namespace edgeprune {

using Json = nlohmann::json;

// Reads JSON text; nothing nested deeper than 64 levels.
// Throws std::invalid_argument.
Json parse_json(const std::string& text);

class JsonObject {
 public:
  // Throws BundleError: no object, a field is unknown or missing.
  JsonObject(const Json& data, std::string where, const std::vector<const char*>& required,
             const std::vector<const char*>& optional = {});

  bool has(const char* name) const { return data_->contains(name); }
  bool is_null(const char* name) const { return !has(name) || (*data_)[name].is_null(); }
  const Json& any(const char* name) const { return (*data_)[name]; }
  std::string where(const char* name) const { return where_ + "." + name; }

  // Throw BundleError if the field has another type.
  std::string text(const char* name) const;
  bool flag(const char* name) const;
  int64_t integer(const char* name) const;
  int64_t integer_or(const char* name, int64_t otherwise) const { return has(name) ? integer(name) : otherwise; }
  double number(const char* name) const;
  std::optional<int64_t> optional_integer(const char* name) const;
  std::optional<double> optional_number(const char* name) const;
  std::vector<int64_t> integers(const char* name) const;
  const Json& list(const char* name) const;
  const Json& object(const char* name) const;

 private:
  const Json* data_;
  std::string where_;
};

// Throws BundleError: the value of a place is not what is expected there.
[[noreturn]] void refuse_json(const std::string& where, const Json& value, const std::string& expected);

}  // namespace edgeprune
