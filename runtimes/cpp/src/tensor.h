// Contiguous tensors in host or device memory.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace edgeprune {

using Shape = std::vector<int64_t>;

enum class DataType { float32, float16, int64 };

size_t element_bytes(DataType type);
// Of a manifest's name. Throws std::invalid_argument.
DataType data_type(const std::string& name);

// Throws std::length_error: a size is negative or the product beyond 2^40.
int64_t element_count(const Shape& shape);

enum class Memory { host, device };

struct Tensor {
  void* address = nullptr;
  Shape shape;
  DataType type = DataType::float32;
  Memory memory = Memory::host;
  std::shared_ptr<void> owner;  // keeps the memory alive

  size_t bytes() const { return static_cast<size_t>(element_count(shape)) * element_bytes(type); }
  // The same memory, `offset` elements behind the start. Throws std::out_of_range if it reaches beyond the end.
  Tensor view(Shape view_shape, int64_t offset = 0) const;

  template <typename T>
  T* data() const {
    return static_cast<T*>(address);
  }
};

using TensorMap = std::map<std::string, Tensor>;

// Uninitialised host memory; at least one element, because a null pointer is no tensor.
Tensor host_tensor(Shape shape, DataType type);
Tensor zero_tensor(Shape shape, DataType type);
Tensor int64_tensor(const std::vector<int64_t>& values, Shape shape);
Tensor int64_tensor(const std::vector<int64_t>& values);
Tensor float32_tensor(const std::vector<float>& values, Shape shape);

// IEEE half precision, rounded to nearest even.
uint16_t half_from_float(float value);
float float_from_half(uint16_t half);

}  // namespace edgeprune
