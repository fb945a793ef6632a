#include "tensorrt/tensorrt_backend.h"

#include "error.h"
#include "tensorrt/engine_graph.h"
#include "tensorrt/plugin_library.h"

namespace edgeprune {
namespace {

// Puts a prompt's graphs on one stream of the GPU, one after the other, and waits only where something is read.
class TensorRtBackend : public Backend {
 public:
  explicit TensorRtBackend(const std::string& library) : runtime_(std::make_shared<TensorRtRuntime>(library)) {}

  std::unique_ptr<Graph> load(const Bundle& bundle, const std::string& name) override {
    const EngineSetEntry& set = engines(bundle);
    if (set.plugin_version && !has_plugins_) {
      load_plugins(runtime_->library, *set.plugin_version);
      has_plugins_ = true;
    }
    const EngineEntry& entry = set.engines.at(name);
    return std::make_unique<EngineGraph>(runtime_, bundle.file(entry.file), name, bundle.manifest().graphs.at(name), entry);
  }

  std::optional<int64_t> longest_sequence(const Bundle& bundle) override {
    return edgeprune::longest_sequence(bundle.manifest(), engines(bundle));
  }

  Tensor allocate(Shape shape, DataType type) override { return runtime_->device.allocate(std::move(shape), type); }

  Tensor upload(const Tensor& tensor) override {
    return tensor.shape.empty() || tensor.memory == Memory::device ? tensor : runtime_->device.upload(tensor);
  }

  Tensor download(const Tensor& tensor) override {
    return tensor.memory == Memory::host ? tensor : runtime_->device.download(tensor);
  }

 private:
  const EngineSetEntry& engines(const Bundle& bundle) const {
    return choose_engines(bundle.manifest(), runtime_->device.driver().sm(), runtime_->library.version());
  }

  std::shared_ptr<TensorRtRuntime> runtime_;
  bool has_plugins_ = false;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const BackendOptions& options) {
  return std::make_unique<TensorRtBackend>(options.library);
}

}  // namespace edgeprune
