#include "attributes.h"

#include <algorithm>
#include <cstring>
#include <sstream>

namespace edgeprune {
namespace {

using nvinfer1::PluginFieldType;

// 0 for a type that no operator has.
size_t bytes_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kCHAR: return 1;
    case PluginFieldType::kINT32: return sizeof(int32_t);
    case PluginFieldType::kINT64: return sizeof(int64_t);
    case PluginFieldType::kFLOAT32: return sizeof(float);
    default: return 0;
  }
}

template <typename T>
std::vector<T> values_of(const std::vector<char>& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

}  // namespace

Attributes::Attributes(const nvinfer1::PluginFieldCollection* fields, AttributeNames known) {
  const int32_t count = fields == nullptr ? 0 : fields->nbFields;
  for (int32_t i = 0; i < count; ++i) {
    const nvinfer1::PluginField& field = fields->fields[i];
    const auto is_it = [&](const char* name) { return field.name != nullptr && !std::strcmp(name, field.name); };
    if (std::none_of(known.begin(), known.end(), is_it)) continue;  // the node's namespace and version
    const size_t bytes = bytes_of(field.type) * static_cast<size_t>(std::max(field.length, 0));
    if (bytes == 0 || field.data == nullptr) {
      throw AttributeError(std::string("the attribute '") + field.name + "' has an unknown type or no value");
    }
    const char* data = static_cast<const char*>(field.data);
    attributes_.push_back({field.name, field.type, field.length, {data, data + bytes}});
  }
}

const Attributes::Attribute& Attributes::find(const char* name) const {
  for (const Attribute& attribute : attributes_) {
    if (attribute.name == name) return attribute;
  }
  throw AttributeError(std::string("the attribute '") + name + "' is missing");
}

std::string Attributes::text(const char* name) const {
  const Attribute& found = find(name);
  if (found.type != PluginFieldType::kCHAR) {
    throw AttributeError(std::string("the attribute '") + name + "' is no text");
  }
  // The parser counts the zero at the end, an engine may leave it away.
  const std::string text(found.bytes.begin(), found.bytes.end());
  return text.substr(0, text.find('\0'));
}

float Attributes::number(const char* name) const {
  const Attribute& found = find(name);
  if (found.type != PluginFieldType::kFLOAT32 || found.length != 1) {
    throw AttributeError(std::string("the attribute '") + name + "' is no number");
  }
  return values_of<float>(found.bytes)[0];
}

std::vector<int64_t> Attributes::integers(const char* name) const {
  const Attribute& found = find(name);
  if (found.type == PluginFieldType::kINT64) return values_of<int64_t>(found.bytes);
  if (found.type != PluginFieldType::kINT32) {
    throw AttributeError(std::string("the attribute '") + name + "' is no whole number");
  }
  const std::vector<int32_t> narrow = values_of<int32_t>(found.bytes);
  return {narrow.begin(), narrow.end()};
}

int64_t Attributes::integer(const char* name) const {
  const std::vector<int64_t> values = integers(name);
  if (values.size() != 1) throw AttributeError(std::string("the attribute '") + name + "' is a list");
  return values[0];
}

std::string Attributes::description() const {
  std::ostringstream out;
  for (const Attribute& attribute : attributes_) {
    out << (out.tellp() > 0 ? "," : "") << attribute.name << '=';
    if (attribute.type == PluginFieldType::kCHAR) {
      out << text(attribute.name.c_str());
    } else if (attribute.type == PluginFieldType::kFLOAT32) {
      for (const float value : values_of<float>(attribute.bytes)) out << value << ' ';
    } else {
      for (const int64_t value : integers(attribute.name.c_str())) out << value << ' ';
    }
  }
  return out.str();
}

const nvinfer1::PluginFieldCollection* Attributes::fields() {
  listed_.clear();
  for (const Attribute& attribute : attributes_) {
    listed_.emplace_back(attribute.name.c_str(), attribute.bytes.data(), attribute.type, attribute.length);
  }
  collection_.nbFields = static_cast<int32_t>(listed_.size());
  collection_.fields = listed_.data();
  return &collection_;
}

}  // namespace edgeprune
