#include "numbers.h"

#include <cstdio>
#include <cstdlib>
#include <numeric>

namespace edgeprune {

double rounded_to(double value, int digits) {
  char text[400];  // the largest double has 309 digits before the point
  std::snprintf(text, sizeof text, "%.*f", digits, value);
  return std::strtod(text, nullptr);
}

int64_t floor_divided(int64_t value, int64_t divisor) {
  return value >= 0 ? value / divisor : -((-value + divisor - 1) / divisor);
}

std::vector<int64_t> counted(int64_t count, int64_t first) {
  std::vector<int64_t> numbers(static_cast<size_t>(count));
  std::iota(numbers.begin(), numbers.end(), first);
  return numbers;
}

}  // namespace edgeprune
