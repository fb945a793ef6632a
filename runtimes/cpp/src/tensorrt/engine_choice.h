// Which engines of a bundle run here, and which of an engine's profiles takes an input: plain functions of data.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/manifest.h"

namespace edgeprune {

// The engines that run on a GPU of that compute capability (87 for 8.7) with that version of TensorRT.
// Throws BackendError: there are none; says what there is instead.
const EngineSetEntry& choose_engines(const Manifest& manifest, int64_t sm, const std::string& version);

// Whether `installed` is the version that built: all numbers that `built_with` has are equal.
bool is_version(const std::string& installed, const std::string& built_with);

// Most rows of a prompt with its answer that the engines take; none for a decoder without a cache. The first segment
// with a cache sees every row; behind a site there are fewer.
std::optional<int64_t> longest_sequence(const Manifest& manifest, const EngineSetEntry& engines);

// Where the size of a dynamic dimension can be read: an input and its axis; of a value, the input alone.
struct DimensionPlace {
  std::string dimension;
  std::string input;
  std::optional<size_t> axis;
};
std::vector<DimensionPlace> dimension_places(const GraphEntry& graph);

// By dimension, in the order of dimension_places.
using DimensionSizes = std::vector<std::pair<std::string, int64_t>>;

// The index of the smallest profile that takes the sizes: the one whose greatest sizes have the fewest elements, because
// TensorRT tunes within a profile's range and a smaller one is closer to what runs.
// Throws BackendError: none does; names dimension, size, range and remedy.
size_t choose_profile(const std::string& graph, const std::vector<ProfileEntry>& profiles, const DimensionSizes& sizes);

}  // namespace edgeprune
