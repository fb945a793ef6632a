#include "decoder/open_graphs.h"

#include <atomic>
#include <exception>
#include <future>
#include <mutex>
#include <vector>

namespace edgeprune {

Graphs open_graphs(const Bundle& bundle, Backend& backend) {
  Graphs graphs;
  // Of a map, places stay where they are.
  for (const auto& [name, entry] : bundle.manifest().graphs) graphs[name] = nullptr;
  std::vector<Graphs::value_type*> places;
  for (auto& place : graphs) places.push_back(&place);
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failed;
  const auto open_some = [&] {
    for (size_t at = next++; at < places.size(); at = next++) {
      try {
        places[at]->second = backend.load(bundle, places[at]->first);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failed) failed = std::current_exception();
        next = places.size();
      }
    }
  };
  std::vector<std::future<void>> helpers;
  for (int helper = 1; helper < backend.loads_at_once(); ++helper) helpers.push_back(std::async(std::launch::async, open_some));
  open_some();
  for (std::future<void>& helper : helpers) helper.get();
  if (failed) std::rethrow_exception(failed);
  return graphs;
}

}  // namespace edgeprune
