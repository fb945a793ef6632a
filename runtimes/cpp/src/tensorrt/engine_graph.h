// A deserialized engine as a graph of the chain.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "tensorrt/cuda_device.h"
#include "tensorrt/device_arena.h"
#include "tensorrt/engine_choice.h"
#include "tensorrt/tensorrt_library.h"

namespace edgeprune {

// What all engines of a backend share; graphs keep it alive.
struct TensorRtRuntime {
  explicit TensorRtRuntime(const std::string& library_path)
      : library(library_path), arena(device.memory()), runtime(library.runtime(log)) {}

  // "tensorrt 10.3.0.26"
  std::string name() const { return "tensorrt " + library.version(); }

  CudaDevice device;
  TensorRtLibrary library;
  TensorRtLog log;
  Arena arena;
  // Contexts keep shapes and addresses from one call to the next, so one thread at a time sets and starts them.
  std::mutex enqueueing;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
};

// One execution context per profile, made when it is first needed.
class EngineGraph : public Graph {
 public:
  // `entry` and `graph` are the manifest's of the name. Throws BackendError.
  EngineGraph(std::shared_ptr<TensorRtRuntime> runtime, const std::filesystem::path& path, std::string name,
              const GraphEntry& graph, const EngineEntry& entry);
  ~EngineGraph() override;
  EngineGraph(const EngineGraph&) = delete;
  EngineGraph& operator=(const EngineGraph&) = delete;

  TensorMap run(const TensorMap& inputs, const TensorMap& outputs) const override;

 private:
  // An input or output of the engine; a size is -1 where it depends on the profile's.
  struct EngineTensor {
    std::string name;
    std::optional<DataType> type;  // none where no bundle has it
    Shape shape;
    bool on_host;  // a size to TensorRT, not data

    bool is_dynamic() const;
  };
  struct Context {
    std::unique_ptr<nvinfer1::IExecutionContext> handle;
    std::shared_ptr<void> arena;
  };

  void check(const EngineTensor& tensor, const Tensor& value) const;
  TensorMap reads(const TensorMap& inputs) const;
  DimensionSizes sizes(const TensorMap& inputs) const;
  Context& context(size_t profile) const;
  TensorMap place_outputs(nvinfer1::IExecutionContext& context, const TensorMap& given) const;
  [[noreturn]] void fail(size_t profile, const std::string& reason) const;
  [[noreturn]] void refuse_engine(const std::string& difference) const;

  std::shared_ptr<TensorRtRuntime> runtime_;
  std::string name_;
  std::vector<ProfileEntry> profiles_;
  std::vector<DimensionPlace> places_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<EngineTensor> inputs_;
  std::vector<EngineTensor> outputs_;
  mutable std::map<size_t, Context> contexts_;  // by profile
};

}  // namespace edgeprune
