// Python's rounding, which decides about sizes and counts.
#pragma once

#include <cstdint>
#include <vector>

namespace edgeprune {

// round(value, digits): to the decimal number that is nearest to the exact value.
double rounded_to(double value, int digits);
// Towards minus infinity; the divisor is positive.
int64_t floor_divided(int64_t value, int64_t divisor);
// 0 … count - 1.
std::vector<int64_t> counted(int64_t count, int64_t first = 0);

}  // namespace edgeprune
