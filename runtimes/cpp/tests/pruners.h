// Pruners by name, the same as those of tests/pruners.py, and a record of what they saw.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeprune/edgeprune.hpp"

namespace pruners {

// What a session's pruner saw on this thread, until somebody empties it.
inline nlohmann::ordered_json& seen() {
  static thread_local nlohmann::ordered_json sites = nlohmann::ordered_json::array();
  return sites;
}

inline void record(const edgeprune::SiteScores& site) {
  nlohmann::ordered_json places = nlohmann::ordered_json::array();
  for (const edgeprune::Place& at : site.places) places.push_back({at.picture, at.grid, at.row, at.column, at.rows, at.columns});
  seen().push_back({{"name", site.name},
                    {"place", site.place},
                    {"layer", site.layer},
                    {"scores", site.scores},
                    {"slots", site.slots},
                    {"places", places},
                    {"own_choice", site.own_choice}});
}

using Choice = std::vector<int64_t> (*)(const edgeprune::SiteScores&);

inline std::vector<int64_t> all(const edgeprune::SiteScores& site) {
  std::vector<int64_t> indices;
  for (size_t index = site.scores.size(); index-- > 0;) indices.push_back(static_cast<int64_t>(index));
  return indices;
}

inline std::vector<int64_t> odd_columns(const edgeprune::SiteScores& site) {
  std::vector<int64_t> indices = {0};
  for (size_t index = 1; index < site.places.size(); ++index) {
    const edgeprune::Place& at = site.places[index];
    if (at.column % 2 == 1 && at.row > at.picture) indices.push_back(static_cast<int64_t>(index));
  }
  return indices;
}

inline edgeprune::Pruner named(const std::string& name) {
  static const std::map<std::string, Choice> choices = {
      {"own", [](const edgeprune::SiteScores& site) { return site.own_choice; }},
      {"third", [](const edgeprune::SiteScores& site) { return site.highest(static_cast<int64_t>(site.scores.size()) / 3); }},
      {"all", all},
      {"odd columns", odd_columns},
      {"nothing", [](const edgeprune::SiteScores&) { return std::vector<int64_t>(); }},
      {"twice", [](const edgeprune::SiteScores&) { return std::vector<int64_t>{2, 1, 0, 2}; }},
      {"negative", [](const edgeprune::SiteScores&) { return std::vector<int64_t>{0, -1}; }},
      {"beyond", [](const edgeprune::SiteScores& site) { return std::vector<int64_t>{0, static_cast<int64_t>(site.scores.size())}; }},
      {"too many", [](const edgeprune::SiteScores& site) { return std::vector<int64_t>(site.scores.size() + 5); }},
      {"raises", [](const edgeprune::SiteScores&) -> std::vector<int64_t> { throw std::domain_error("no time is left"); }},
  };
  return [choice = choices.at(name)](const edgeprune::SiteScores& site) {
    record(site);
    return choice(site);
  };
}

}  // namespace pruners
