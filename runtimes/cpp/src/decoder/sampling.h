// From logits to the next token.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "decoder/pcg64.h"
#include "tensor.h"

namespace edgeprune {

// How tokens are chosen and when generation ends; the fields of edgeprune.runtimes.sampling.SamplingOptions.
struct SamplingOptions {
  int64_t max_new_tokens = 64;
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;

  // Throws PromptError: a field is out of its range.
  void check() const;
};

// Chooses one token per call; with a seed, the same calls choose the same tokens.
class TokenSampler {
 public:
  explicit TokenSampler(const SamplingOptions& options) : options_(options), generator_(options.seed) {}

  // Of logits [1, V] in host memory. Throws BackendError: they hold NaN or +inf, or nothing but −inf.
  int64_t choose(const Tensor& logits);

 private:
  std::vector<double> probabilities(std::vector<double> scores) const;

  SamplingOptions options_;
  Pcg64 generator_;
};

}  // namespace edgeprune
