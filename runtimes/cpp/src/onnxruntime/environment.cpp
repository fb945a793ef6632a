#include "onnxruntime/environment.h"

#include <map>
#include <memory>
#include <mutex>

namespace edgeprune::ort {
namespace {

// ONNX Runtime counts who uses its environment, ignores the options of all but the first, and does not tell how large the
// pool is. So that is remembered here, as long as ONNX Runtime does.
struct Pool {
  int threads;
  int users;
};

std::mutex& mutex() {
  static std::mutex one;
  return one;
}

// Of each ONNX Runtime in the process.
std::map<const Env*, Pool>& pools() {
  static std::map<const Env*, Pool> by_environment;
  return by_environment;
}

using Options = std::unique_ptr<ThreadingOptions, void (*)(ThreadingOptions*)>;

Options pool_options(const Library& library, int threads) {
  const Api& api = library.api();
  ThreadingOptions* made = nullptr;
  library.check(api.CreateThreadingOptions(&made), "cannot start");
  Options options(made, api.ReleaseThreadingOptions);
  library.check(api.SetGlobalIntraOpNumThreads(options.get(), threads), "cannot start");
  // Graphs run one operator at a time.
  library.check(api.SetGlobalInterOpNumThreads(options.get(), 1), "cannot start");
  // Threads that spin between two graphs, and while graphs are opened, take the cores from who has work.
  library.check(api.SetGlobalSpinControl(options.get(), 0), "cannot start");
  return options;
}

}  // namespace

Environment::Environment(const Library& library, int threads) : library_(&library) {
  const Options options = pool_options(library, threads);
  const std::lock_guard<std::mutex> lock(mutex());
  library.check(library.api().CreateEnvWithGlobalThreadPools(kLogError, "edgeprune", options.get(), &env_), "cannot start");
  library.check(library.api().DisableTelemetryEvents(env_), "cannot start");
  Pool& pool = pools().emplace(env_, Pool{threads, 0}).first->second;
  ++pool.users;
  pool_fits_ = pool.threads == threads;
}

Environment::~Environment() {
  const std::lock_guard<std::mutex> lock(mutex());
  const auto pool = pools().find(env_);
  if (--pool->second.users == 0) pools().erase(pool);
  library_->api().ReleaseEnv(env_);
}

}  // namespace edgeprune::ort
