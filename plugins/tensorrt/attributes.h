// The attributes of a node, as TensorRT's parser gives them to a creator and as an engine keeps them.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgeprune {

// An attribute is missing, has another type, or a value that there is no kernel for.
class AttributeError : public std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// The names of the attributes that an operator has.
using AttributeNames = std::initializer_list<const char*>;

// Copies of those of the given fields that an operator knows. The readers throw AttributeError.
class Attributes {
 public:
  Attributes(const nvinfer1::PluginFieldCollection* fields, AttributeNames known);

  std::string text(const char* name) const;
  float number(const char* name) const;
  std::vector<int64_t> integers(const char* name) const;
  int64_t integer(const char* name) const;

  // As "name=value" with commas between, for TensorRT's reports.
  std::string description() const;

  // To be written into an engine; valid until the attributes change or go.
  const nvinfer1::PluginFieldCollection* fields();

 private:
  struct Attribute {
    std::string name;
    nvinfer1::PluginFieldType type;
    int32_t length;
    std::vector<char> bytes;
  };

  const Attribute& find(const char* name) const;

  std::vector<Attribute> attributes_;
  std::vector<nvinfer1::PluginField> listed_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace edgeprune
