// Rows of one key head, as all AttentionScore kernels count them: row m is row m % R of its query head m / R.
#pragma once

#include "attention_plan.h"

namespace edgeprune {

// Where the query rows of one key head lie, and which keys they see.
template <typename T>
struct QueryRows {
  const T* first;  // of the first query head of the key head
  const AttentionArguments& a;

  __device__ QueryRows(const AttentionArguments& arguments, int64_t head)
      : first(static_cast<const T*>(arguments.query) +
              head * (arguments.problem.heads / arguments.problem.key_heads) *
                  arguments.problem.query_length * arguments.problem.head_dim),
        a(arguments) {}

  __device__ int row(int m) const {
    return m - static_cast<int>(a.per_head.quotient(m) * a.per_head.divisor);
  }

  __device__ const T* operator()(int m) const {
    // Without a list all rows score, and the heads lie one behind the other.
    int64_t at = m;
    if (a.query_rows != nullptr) {
      at = static_cast<int64_t>(a.per_head.quotient(m)) * a.problem.query_length + a.query_rows[row(m)];
    }
    return first + at * a.problem.head_dim;
  }

  // The last key that row m sees; -1 for none.
  __device__ int last_key(int m) const {
    const int end = a.problem.keys - 1;
    if (!a.problem.causal) return end;
    const int64_t index = a.row_index[row(m)];
    return index < 0 ? -1 : index < end ? static_cast<int>(index) : end;
  }

  __device__ float weight(int g, int m, int64_t b) const {
    const int64_t of_batch = a.problem.weights_per_batch ? b * a.problem.groups : 0;
    return a.row_weight[(of_batch + g) * a.problem.rows + row(m)];
  }
};

// A running maximum m and Σ exp₂(x - m) of the numbers seen so far.
struct SoftmaxSum {
  float max = -INFINITY, sum = 0;

  // What the exponents are relative to: any number where nothing was seen, so that -inf - -inf never occurs.
  static __device__ float base(float max) { return max == -INFINITY ? 0.0f : max; }

  __device__ void merge(float other_max, float other_sum) {
    const float both = fmaxf(max, other_max), at = base(both);
    sum = sum * exp2_fast(max - at) + other_sum * exp2_fast(other_max - at);
    max = both;
  }

  // log₂ of the sum: exp₂(x - result) is the probability of x.
  __device__ float log2_sum() const { return max + log2f(sum); }
};

}  // namespace edgeprune
