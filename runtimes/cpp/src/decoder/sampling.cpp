#include "decoder/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "error.h"
#include "text/unicode.h"

namespace edgeprune {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// NumPy's order of summation, so that its roundings are the same.
double pairwise_sum(const double* values, size_t count) {
  if (count < 8) return std::accumulate(values, values + count, 0.0);
  if (count <= 128) {
    double parts[8];
    std::copy_n(values, 8, parts);
    size_t at = 8;
    for (; at < count - count % 8; at += 8) {
      for (size_t part = 0; part < 8; ++part) parts[part] += values[at + part];
    }
    double sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    for (; at < count; ++at) sum += values[at];
    return sum;
  }
  size_t half = count / 2;
  half -= half % 8;
  return pairwise_sum(values, half) + pairwise_sum(values + half, count - half);
}

void softmax(std::vector<double>& scores) {
  const double highest = *std::max_element(scores.begin(), scores.end());
  for (double& score : scores) score = std::exp(score - highest);
  const double sum = pairwise_sum(scores.data(), scores.size());
  for (double& score : scores) score /= sum;
}

std::vector<double> scores_of(const Tensor& logits) {
  std::vector<double> scores(static_cast<size_t>(element_count(logits.shape)));
  for (size_t index = 0; index < scores.size(); ++index) {
    switch (logits.type) {
      case DataType::float32:
        scores[index] = static_cast<double>(logits.data<float>()[index]);
        break;
      case DataType::float16:
        scores[index] = static_cast<double>(float_from_half(logits.data<uint16_t>()[index]));
        break;
      case DataType::int64:
        throw BackendError("logits of integers are not those of one token: export the bundle again");
    }
  }
  return scores;
}

// A NaN anywhere is the largest.
double largest(const std::vector<double>& scores) {
  double highest = kMinusInfinity;
  for (const double score : scores) {
    if (std::isnan(score)) return score;
    highest = std::max(highest, score);
  }
  return highest;
}

}  // namespace

void SamplingOptions::check() const {
  if (max_new_tokens < 1) {
    throw PromptError("max_new_tokens must be an integer of at least 1, not " + std::to_string(max_new_tokens));
  }
  if (!std::isfinite(temperature) || temperature < 0) {
    throw PromptError("temperature must be 0 (greedy) or a positive number, not " + std::to_string(temperature));
  }
  if (top_k < 0) throw PromptError("top_k must be 0 (all tokens) or a positive integer, not " + std::to_string(top_k));
  if (!std::isfinite(top_p) || top_p <= 0 || top_p > 1) {
    throw PromptError("top_p must be above 0 and at most 1, not " + std::to_string(top_p));
  }
  for (const std::string& text : stop) {
    if (text.empty() || !is_utf8(text)) throw PromptError("stop must be a tuple of non-empty texts, not '" + text + "'");
  }
}

int64_t TokenSampler::choose(const Tensor& logits) {
  std::vector<double> scores = scores_of(logits);
  if (scores.empty()) throw BackendError("logits of no token are not those of one token: export the bundle again");
  const double highest = largest(scores);
  if (!std::isfinite(highest)) {
    throw BackendError("the model's largest logit is " + std::to_string(highest) +
                       ", most likely an overflow of float16: run the bundle in float32 or bfloat16, and check the export "
                       "with 'edgeprune verify'");
  }
  if (options_.temperature == 0) return std::max_element(scores.begin(), scores.end()) - scores.begin();
  std::vector<double> cumulative = probabilities(std::move(scores));
  std::partial_sum(cumulative.begin(), cumulative.end(), cumulative.begin());
  const double draw = generator_.random() * cumulative.back();
  const auto token = std::upper_bound(cumulative.begin(), cumulative.end(), draw);
  // Rounding may put the draw on the sum itself: then it belongs to the last token that can be drawn.
  const auto last = std::lower_bound(cumulative.begin(), cumulative.end(), cumulative.back());
  return std::min(token, last) - cumulative.begin();
}

// Temperature, then top-k, then top-p, as transformers filters.
std::vector<double> TokenSampler::probabilities(std::vector<double> scores) const {
  for (double& score : scores) score /= options_.temperature;
  if (options_.top_k > 0 && options_.top_k < static_cast<int64_t>(scores.size())) {
    // Tokens that tie with the k-th stay.
    std::vector<double> sorted = scores;
    const auto kth = sorted.end() - static_cast<std::ptrdiff_t>(options_.top_k);
    std::nth_element(sorted.begin(), kth, sorted.end());
    for (double& score : scores) {
      if (score < *kth) score = kMinusInfinity;
    }
  }
  if (options_.top_p < 1) {
    // Ascending, and of equal scores the higher id first, so that ties are kept from the lowest id on.
    std::vector<size_t> order(scores.size());
    std::iota(order.rbegin(), order.rend(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scores[a] < scores[b]; });
    std::vector<double> ascending;
    for (const size_t index : order) ascending.push_back(scores[index]);
    softmax(ascending);
    std::partial_sum(ascending.begin(), ascending.end(), ascending.begin());
    for (size_t index = 0; index + 1 < order.size(); ++index) {
      if (ascending[index] <= 1 - options_.top_p) scores[order[index]] = kMinusInfinity;
    }
  }
  softmax(scores);
  return scores;
}

}  // namespace edgeprune
