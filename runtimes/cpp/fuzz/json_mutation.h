// JSON changed at one place, so that what libFuzzer makes of it is JSON most of the time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <string>

#include "bundle/json_object.h"

// libFuzzer's own mutation.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

namespace edgeprune::fuzz {

using Random = std::minstd_rand;

inline size_t below(size_t count, Random& random) { return random() % count; }

inline void mutate_text(std::string& text, size_t room) {
  const size_t size = text.size();
  text.resize(size + room);
  text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), size, text.size()));
}

inline void mutate_place(Json& place, Random& random) {
  static const Json values = Json::parse(
      R"([null, true, false, 0, 1, -1, 0.5, 2147483647, 2147483648, 9223372036854775807, -9223372036854775808,
          18446744073709551615, 1e308, 1e-308, "", "a", "..", "a/../b", "\u0000", "\ud83d\ude42", [], [[]], {}, {"": 0}])");
  if (place.is_string() && below(3, random) != 0) {
    std::string text = place.get<std::string>();
    mutate_text(text, 8);
    place = text;
  } else if (place.is_number_integer() && below(2, random) != 0) {
    // In unsigned arithmetic: it may overflow.
    const auto number = place.get<uint64_t>();
    const uint64_t changed[] = {number + 1, number - 1, number * 2, number / 2, 0 - number, uint64_t{random()}};
    place = static_cast<int64_t>(changed[below(6, random)]);
  } else {
    place = values[below(values.size(), random)];
  }
}

// Puts `other` where something is, or beside it; or takes something away.
inline void mutate_container(Json& container, const Json& other, Random& random) {
  const auto child = std::next(container.begin(), static_cast<std::ptrdiff_t>(below(container.size(), random)));
  const size_t kind = below(3, random);
  if (kind == 0) {
    container.erase(child);
  } else if (kind == 1 || container.is_object()) {
    *child = Json(other);
  } else {
    container.insert(child, other);
  }
}

// A place of the value, its root included.
inline Json& any_place(Json& value, Random& random) {
  Json* place = &value;
  while (place->is_structured() && !place->empty() && below(6, random) != 0) {
    place = &*std::next(place->begin(), static_cast<std::ptrdiff_t>(below(place->size(), random)));
  }
  return *place;
}

// The text of the JSON, changed at one place; not JSON is changed as bytes.
inline std::string mutated_json(std::string text, Random& random) {
  Json value = Json::parse(text, nullptr, false);
  if (value.is_discarded() || below(10, random) == 0) {
    mutate_text(text, 64);
    return text;
  }
  const Json other = any_place(value, random);
  Json& place = any_place(value, random);
  if (place.is_structured() && !place.empty() && below(4, random) != 0) {
    mutate_container(place, other, random);
  } else {
    mutate_place(place, random);
  }
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace edgeprune::fuzz
