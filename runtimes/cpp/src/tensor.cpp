#include "tensor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

namespace edgeprune {
namespace {

constexpr int64_t kMostElements = int64_t{1} << 40;
constexpr size_t kAlignment = 64;

std::shared_ptr<void> aligned(size_t bytes) {
  return {::operator new(bytes, std::align_val_t{kAlignment}),
          [](void* address) { ::operator delete(address, std::align_val_t{kAlignment}); }};
}

}  // namespace

size_t element_bytes(DataType type) {
  switch (type) {
    case DataType::float32:
      return 4;
    case DataType::float16:
      return 2;
    case DataType::int64:
      return 8;
  }
  throw std::invalid_argument("unknown data type");
}

DataType data_type(const std::string& name) {
  if (name == "float32") return DataType::float32;
  if (name == "float16") return DataType::float16;
  if (name == "int64") return DataType::int64;
  throw std::invalid_argument("unknown data type " + name);
}

int64_t element_count(const Shape& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0) throw std::length_error("a tensor's size is negative");
    if (size > 0 && count > kMostElements / size) throw std::length_error("a tensor is too large");
    count *= size;
  }
  return count;
}

Tensor Tensor::view(Shape view_shape, int64_t offset) const {
  const int64_t count = element_count(view_shape);
  if (offset < 0 || offset + count > element_count(shape)) throw std::out_of_range("a view does not fit into its tensor");
  char* start = static_cast<char*>(address) + static_cast<size_t>(offset) * element_bytes(type);
  return {start, std::move(view_shape), type, memory, owner};
}

Tensor host_tensor(Shape shape, DataType type) {
  const auto count = static_cast<size_t>(element_count(shape));
  std::shared_ptr<void> memory = aligned(std::max<size_t>(count, 1) * element_bytes(type));
  void* address = memory.get();
  return {address, std::move(shape), type, Memory::host, std::move(memory)};
}

Tensor zero_tensor(Shape shape, DataType type) {
  Tensor tensor = host_tensor(std::move(shape), type);
  std::memset(tensor.address, 0, tensor.bytes());
  return tensor;
}

namespace {

template <typename T>
Tensor copied(const std::vector<T>& values, Shape shape, DataType type) {
  Tensor tensor = host_tensor(std::move(shape), type);
  if (tensor.bytes() != values.size() * sizeof(T)) throw std::invalid_argument("values do not fill the shape");
  if (!values.empty()) std::memcpy(tensor.address, values.data(), tensor.bytes());
  return tensor;
}

}  // namespace

Tensor int64_tensor(const std::vector<int64_t>& values, Shape shape) {
  return copied(values, std::move(shape), DataType::int64);
}

Tensor int64_tensor(const std::vector<int64_t>& values) {
  return copied(values, {static_cast<int64_t>(values.size())}, DataType::int64);
}

Tensor float32_tensor(const std::vector<float>& values, Shape shape) {
  return copied(values, std::move(shape), DataType::float32);
}

uint16_t half_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 6.103515625e-05f) {
    // Below the normal numbers steps are 2^-24; std::nearbyint rounds halves to even.
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f)));
  }
  const uint32_t magnitude_bits = bits & 0x7FFFFFFFu;
  const uint32_t rounded = magnitude_bits + 0x0FFFu + ((magnitude_bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((rounded >> 13) - (112u << 10)));
}

float float_from_half(uint16_t half) {
  const int exponent = (half >> 10) & 31;
  const int mantissa = half & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace edgeprune
