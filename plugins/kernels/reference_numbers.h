// float16 and bfloat16 as the references read them: the bits, widened.
#pragma once

#include <stdint.h>

#include <cmath>
#include <cstring>

#include "kernel_types.h"

namespace edgeprune {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float float_from_float16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (bits >> 10) & 0x1f;
  const int fraction = bits & 0x3ff;
  if (exponent == 0x1f) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction | 0x400), exponent - 25);
}

inline float read_element(const void* data, int64_t i, ElementType type) {
  if (type == ElementType::float32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == ElementType::float16 ? float_from_float16(bits)
                                      : float_from_bits(static_cast<uint32_t>(bits) << 16);
}

}  // namespace edgeprune
