#include "tensorrt/engine_choice.h"

#include <algorithm>
#include <array>
#include <sstream>

#include "decoder/tensor_names.h"
#include "error.h"

namespace edgeprune {
namespace {

constexpr const char* kBuild = "edgeprune build BUNDLE --target this";
constexpr const char* kBuilder = "tensorrt";

bool is_current(const Manifest& manifest, const EngineSetEntry& entry) {
  return std::all_of(manifest.graphs.begin(), manifest.graphs.end(), [&](const auto& named) {
    const auto engine = entry.engines.find(named.first);
    return engine != entry.engines.end() && engine->second.onnx_sha256 == named.second.file.sha256;
  });
}

bool grows_with_sequence(const std::string& dimension) {
  constexpr std::array<const char*, 9> names = {"sequence",     "past",          "past + sequence", "prompt", "kept", "text_rows",
                                                "context_rows", "visual_tokens", names::kNumKeep};
  return std::any_of(names.begin(), names.end(), [&](const char* name) { return dimension == name; });
}

bool fits(const ProfileEntry& profile, const DimensionSizes& sizes) {
  return std::all_of(profile.ranges.begin(), profile.ranges.end(), [&](const auto& named) {
    const auto found = std::find_if(sizes.begin(), sizes.end(), [&](const auto& size) { return size.first == named.first; });
    return found != sizes.end() && named.second.holds(found->second);
  });
}

// A double, because the product of many sizes may be beyond any integer.
double elements(const ProfileEntry& profile) {
  double product = 1;
  for (const auto& [dimension, range] : profile.ranges) product *= static_cast<double>(std::max<int64_t>(1, range.greatest));
  return product;
}

// Names the dimension that most profiles fail on.
std::string outside(const std::string& graph, const std::vector<ProfileEntry>& profiles, const DimensionSizes& sizes) {
  const std::pair<std::string, int64_t>* worst = nullptr;
  int64_t most = 0;
  for (const auto& size : sizes) {
    const auto misses = std::count_if(profiles.begin(), profiles.end(), [&](const ProfileEntry& profile) {
      const auto range = profile.ranges.find(size.first);
      return range != profile.ranges.end() && !range->second.holds(size.second);
    });
    if (misses > most) most = misses, worst = &size;
  }
  if (worst == nullptr) return graph + ": the manifest's profiles are not those of the graph: " + kBuild;
  std::vector<std::string> ranges;
  for (const ProfileEntry& profile : profiles) {
    const auto range = profile.ranges.find(worst->first);
    if (range == profile.ranges.end()) continue;
    const std::string text = std::to_string(range->second.least) + " … " + std::to_string(range->second.greatest);
    if (std::find(ranges.begin(), ranges.end(), text) == ranges.end()) ranges.push_back(text);
  }
  std::string listed;
  for (const std::string& text : ranges) listed += (listed.empty() ? "" : " or ") + text;
  return graph + ": " + worst->first + " is " + std::to_string(worst->second) + ", the engine was built for " + listed +
         ": build with a larger " + (grows_with_sequence(worst->first) ? "--max-sequence" : "--max-images") +
         ", or with a file of --profiles, or ask about less";
}

}  // namespace

bool is_version(const std::string& installed, const std::string& built_with) {
  std::istringstream have(installed), need(built_with);
  std::string own;
  bool any = false;
  for (std::string number; std::getline(need, number, '.'); any = true) {
    if (!std::getline(have, own, '.') || own != number) return false;
  }
  return any;
}

const EngineSetEntry& choose_engines(const Manifest& manifest, int64_t sm, const std::string& version) {
  if (manifest.engines.empty()) throw BackendError(std::string("the bundle has no engines: ") + kBuild);
  std::string there;
  std::vector<std::pair<std::string, const EngineSetEntry*>> here;
  for (const auto& [name, entry] : manifest.engines) {
    there += (there.empty() ? "" : ", ") + name + " (SM " + std::to_string(entry.sm) + ")";
    if (entry.sm == sm) here.emplace_back(name, &entry);
  }
  if (here.empty()) {
    throw BackendError("the bundle has engines for " + there + ", and this GPU is SM " + std::to_string(sm) + ": " + kBuild);
  }
  const auto first = here.front();
  const auto other = [&](const auto& named) {
    return named.second->builder != kBuilder || !is_version(version, named.second->tensorrt_version);
  };
  here.erase(std::remove_if(here.begin(), here.end(), other), here.end());
  if (here.empty()) {
    const EngineSetEntry& entry = *first.second;
    const std::string have = "the engines '" + first.first + "' are of " + entry.builder + " " + entry.tensorrt_version;
    if (entry.builder != kBuilder) {
      throw BackendError(have + ", and the C++ runtime runs those of " + kBuilder + " (libnvinfer): " + kBuild +
                         " with the package " + kBuilder + ", or run them with Python");
    }
    throw BackendError(have + ", and an engine runs with the very version that built it; installed is " + kBuilder + " " +
                       version + ": " + kBuild + ", or install " + kBuilder + "==" + entry.tensorrt_version);
  }
  for (const auto& [name, entry] : here) {
    if (is_current(manifest, *entry)) return *entry;
  }
  throw BackendError("the engines '" + here.front().first + "' were built from other graphs than the bundle has now: " + kBuild);
}

std::optional<int64_t> longest_sequence(const Manifest& manifest, const EngineSetEntry& engines) {
  for (const SegmentEntry& segment : manifest.segments) {
    std::optional<int64_t> longest;
    for (const ProfileEntry& profile : engines.engines.at(segment.graph).profiles) {
      const auto past = profile.ranges.find("past");
      if (past != profile.ranges.end()) longest = std::max(longest.value_or(0), past->second.greatest + 1);
    }
    if (longest) return longest;
  }
  return std::nullopt;
}

std::vector<DimensionPlace> dimension_places(const GraphEntry& graph) {
  std::vector<DimensionPlace> places;
  const auto known = [&](const std::string& dimension) {
    return std::any_of(places.begin(), places.end(), [&](const DimensionPlace& place) { return place.dimension == dimension; });
  };
  for (const TensorEntry& tensor : graph.inputs) {
    if (tensor.name == names::kNumKeep && !known(tensor.name)) places.push_back({tensor.name, tensor.name, std::nullopt});
    for (size_t axis = 0; axis < tensor.shape.size(); ++axis) {
      const std::string& dimension = tensor.shape[axis].name;
      if (!dimension.empty() && !known(dimension)) places.push_back({dimension, tensor.name, axis});
    }
  }
  return places;
}

size_t choose_profile(const std::string& graph, const std::vector<ProfileEntry>& profiles, const DimensionSizes& sizes) {
  std::optional<size_t> smallest;
  for (size_t index = 0; index < profiles.size(); ++index) {
    if (!fits(profiles[index], sizes)) continue;
    if (!smallest || elements(profiles[index]) < elements(profiles[*smallest])) smallest = index;
  }
  if (smallest) return *smallest;
  throw BackendError(outside(graph, profiles, sizes));
}

}  // namespace edgeprune
