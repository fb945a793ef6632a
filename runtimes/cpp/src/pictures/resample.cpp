#include "pictures/resample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace edgeprune {
namespace {

constexpr double kPi = 3.14159265358979323846;
// Of the weights: 8 bits of pixel and 2 of overshoot are left of 32.
constexpr int kPrecision = 22;

const std::array<std::pair<const char*, Resampling>, 6> kNames = {{{"nearest", Resampling::nearest},
                                                                   {"lanczos", Resampling::lanczos},
                                                                   {"bilinear", Resampling::bilinear},
                                                                   {"bicubic", Resampling::bicubic},
                                                                   {"box", Resampling::box},
                                                                   {"hamming", Resampling::hamming}}};

double sinc(double x) { return x == 0 ? 1 : std::sin(kPi * x) / (kPi * x); }

double lanczos(double x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

double bilinear(double x) { return std::max(0.0, 1 - std::fabs(x)); }

double box(double x) { return x > -0.5 && x <= 0.5 ? 1 : 0; }

double hamming(double x) {
  x = std::fabs(x);
  if (x == 0) return 1;
  if (x >= 1) return 0;
  x *= kPi;
  return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
}

struct Filter {
  double (*weight)(double);
  double support;
};

Filter filter_of(Resampling resampling) {
  switch (resampling) {
    case Resampling::lanczos:
      return {lanczos, 3};
    case Resampling::bilinear:
      return {bilinear, 1};
    case Resampling::bicubic:
      return {bicubic, 2};
    case Resampling::hamming:
      return {hamming, 1};
    default:
      return {box, 0.5};
  }
}

// What one pixel of the result is made of.
struct Window {
  int64_t first;
  std::vector<int32_t> weights;
};

std::vector<Window> windows(int64_t from, int64_t to, const Filter& filter) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  const double stretch = std::max(scale, 1.0);
  const double support = filter.support * stretch;
  std::vector<Window> made;
  made.reserve(static_cast<size_t>(to));
  for (int64_t index = 0; index < to; ++index) {
    const double center = (static_cast<double>(index) + 0.5) * scale;
    const auto first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const auto end = std::min<int64_t>(from, static_cast<int64_t>(center + support + 0.5));
    std::vector<double> weights;
    double sum = 0;
    for (int64_t at = first; at < end; ++at) {
      weights.push_back(filter.weight((static_cast<double>(at) - center + 0.5) * (1 / stretch)));
      sum += weights.back();
    }
    Window window{first, {}};
    for (double weight : weights) {
      if (sum != 0) weight /= sum;
      weight *= 1 << kPrecision;
      window.weights.push_back(static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5));
    }
    made.push_back(std::move(window));
  }
  return made;
}

uint8_t rounded(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kPrecision, 0, 255)); }

constexpr int32_t kHalf = 1 << (kPrecision - 1);

Picture across(const Picture& picture, int64_t width, const Filter& filter) {
  const std::vector<Window> columns = windows(picture.width, width, filter);
  Picture result{width, picture.height, std::vector<uint8_t>(static_cast<size_t>(width * picture.height * 3)), picture.was_rgb};
  for (int64_t y = 0; y < picture.height; ++y) {
    uint8_t* target = result.row(y);
    for (const Window& window : columns) {
      const uint8_t* source = picture.row(y) + 3 * window.first;
      int32_t red = kHalf, green = kHalf, blue = kHalf;
      for (const int32_t weight : window.weights) {
        red += weight * source[0], green += weight * source[1], blue += weight * source[2];
        source += 3;
      }
      *target++ = rounded(red);
      *target++ = rounded(green);
      *target++ = rounded(blue);
    }
  }
  return result;
}

Picture down(const Picture& picture, int64_t height, const Filter& filter) {
  const std::vector<Window> rows = windows(picture.height, height, filter);
  const auto values = static_cast<size_t>(picture.width * 3);
  Picture result{picture.width, height, std::vector<uint8_t>(values * static_cast<size_t>(height)), picture.was_rgb};
  std::vector<int32_t> sums(values);
  for (int64_t y = 0; y < height; ++y) {
    const Window& window = rows[static_cast<size_t>(y)];
    std::fill(sums.begin(), sums.end(), kHalf);
    for (size_t index = 0; index < window.weights.size(); ++index) {
      const uint8_t* source = picture.row(window.first + static_cast<int64_t>(index));
      const int32_t weight = window.weights[index];
      for (size_t value = 0; value < values; ++value) sums[value] += weight * source[value];
    }
    uint8_t* target = result.row(y);
    for (size_t value = 0; value < values; ++value) target[value] = rounded(sums[value]);
  }
  return result;
}

// The nearest pixels' places; the steps are summed up as Pillow sums them.
std::vector<int64_t> nearest_places(int64_t from, int64_t to) {
  const double step = static_cast<double>(from) / static_cast<double>(to);
  std::vector<int64_t> places;
  double at = step * 0.5;
  for (int64_t index = 0; index < to; ++index, at += step) {
    places.push_back(std::min(static_cast<int64_t>(at), from - 1));
  }
  return places;
}

Picture nearest(const Picture& picture, int64_t width, int64_t height) {
  const std::vector<int64_t> columns = nearest_places(picture.width, width), rows = nearest_places(picture.height, height);
  Picture result{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3)), picture.was_rgb};
  uint8_t* target = result.pixels.data();
  for (const int64_t y : rows) {
    for (const int64_t x : columns) target = std::copy_n(picture.row(y) + 3 * x, 3, target);
  }
  return result;
}

}  // namespace

std::optional<Resampling> resampling(const std::string& name) {
  for (const auto& [known, kind] : kNames) {
    if (name == known) return kind;
  }
  return std::nullopt;
}

std::string known_resamplings() {
  std::string names;
  for (const auto& entry : kNames) names += (names.empty() ? "" : ", ") + std::string(entry.first);
  return names;
}

Picture resized(const Picture& picture, int64_t width, int64_t height, Resampling resampling) {
  check_picture_size("the resized picture", width, height);
  if (width == picture.width && height == picture.height) return picture;
  if (resampling == Resampling::nearest) return nearest(picture, width, height);
  const Filter filter = filter_of(resampling);
  // Pillow, from 13 on, begins with the height where that shrinks by much more (python-pillow/Pillow #9549); the order
  // shows in the 8 bits between the passes.
  if (height < picture.height && picture.height - height > 2 * (picture.width - width)) {
    const Picture lower = down(picture, height, filter);
    return width == picture.width ? lower : across(lower, width, filter);
  }
  Picture result = width == picture.width ? picture : across(picture, width, filter);
  return height == picture.height ? result : down(result, height, filter);
}

}  // namespace edgeprune
