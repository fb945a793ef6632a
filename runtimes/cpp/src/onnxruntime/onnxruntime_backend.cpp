#include "onnxruntime/onnxruntime_backend.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "error.h"
#include "onnxruntime/device_copy.h"
#include "onnxruntime/environment.h"
#include "onnxruntime/library.h"

namespace edgeprune {
namespace {

using ort::Api;
using ort::Library;

// What every graph of a backend needs; graphs and tensors keep it alive.
struct Runtime {
  Runtime(const std::string& path, int threads) : library(path), environment(library, threads) {
    const Api& api = library.api();
    library.check(api.CreateCpuMemoryInfo(ort::kDeviceAllocator, ort::kMemoryTypeDefault, &host), "cannot start");
    library.check(api.CreateMemoryInfo("Cuda", ort::kDeviceAllocator, 0, ort::kMemoryTypeDefault, &device), "cannot start");
  }
  ~Runtime() {
    if (device != nullptr) library.api().ReleaseMemoryInfo(device);
    if (host != nullptr) library.api().ReleaseMemoryInfo(host);
  }
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  Library library;
  ort::Environment environment;
  ort::MemoryInfo* host = nullptr;
  ort::MemoryInfo* device = nullptr;
};

using RuntimePointer = std::shared_ptr<Runtime>;

int element_type(DataType type) {
  switch (type) {
    case DataType::float32:
      return ort::kElementFloat;
    case DataType::float16:
      return ort::kElementFloat16;
    case DataType::int64:
      return ort::kElementInt64;
  }
  throw BackendError("unknown data type");
}

DataType data_type_of(int element, const std::string& name) {
  if (element == ort::kElementFloat) return DataType::float32;
  if (element == ort::kElementFloat16) return DataType::float16;
  if (element == ort::kElementInt64) return DataType::int64;
  throw BackendError("ONNX Runtime gives '" + name + "' an element type that no bundle has: export the bundle again");
}

class Value {
 public:
  Value(const Runtime& runtime, ort::Value* value) : runtime_(&runtime), value_(value) {}
  Value(const Runtime& runtime, const Tensor& tensor) : runtime_(&runtime) {
    const ort::MemoryInfo* memory = tensor.memory == Memory::host ? runtime.host : runtime.device;
    static char nothing;  // an empty tensor may have no memory, a null pointer is refused
    void* address = tensor.address != nullptr ? tensor.address : &nothing;
    runtime.library.check(
        runtime.library.api().CreateTensorWithDataAsOrtValue(memory, address, tensor.bytes(), tensor.shape.data(),
                                                             tensor.shape.size(), element_type(tensor.type), &value_),
        "cannot take a tensor");
  }
  ~Value() {
    if (value_ != nullptr) runtime_->library.api().ReleaseValue(value_);
  }
  Value(Value&& other) noexcept : runtime_(other.runtime_), value_(other.release()) {}
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;
  Value& operator=(Value&&) = delete;

  ort::Value* get() const { return value_; }
  ort::Value* release() {
    ort::Value* value = value_;
    value_ = nullptr;
    return value;
  }

 private:
  const Runtime* runtime_;
  ort::Value* value_ = nullptr;
};

// A tensor that ONNX Runtime allocated; it frees it with its last view.
Tensor tensor_of(const RuntimePointer& runtime, Value value, const std::string& name, Memory memory) {
  const Library& library = runtime->library;
  const Api& api = library.api();
  ort::TensorTypeAndShapeInfo* info = nullptr;
  const std::string doing = "cannot give '" + name + "'";
  library.check(api.GetTensorTypeAndShape(value.get(), &info), doing);
  const std::unique_ptr<ort::TensorTypeAndShapeInfo, void (*)(ort::TensorTypeAndShapeInfo*)> released(
      info, api.ReleaseTensorTypeAndShapeInfo);
  int element = 0;
  size_t axes = 0;
  library.check(api.GetTensorElementType(info, &element), doing);
  library.check(api.GetDimensionsCount(info, &axes), doing);
  Tensor tensor;
  tensor.shape.resize(axes);
  library.check(api.GetDimensions(info, tensor.shape.data(), axes), doing);
  tensor.type = data_type_of(element, name);
  tensor.memory = memory;
  library.check(api.GetTensorMutableData(value.get(), &tensor.address), doing);
  tensor.owner = {value.release(), [runtime](void* address) {
                    runtime->library.api().ReleaseValue(static_cast<ort::Value*>(address));
                  }};
  return tensor;
}

class OnnxRuntimeGraph : public Graph {
 public:
  OnnxRuntimeGraph(RuntimePointer runtime, const std::filesystem::path& path, const BackendOptions& backend)
      : runtime_(std::move(runtime)), name_(path.filename().string()), on_device_(backend.provider != "cpu") {
    const Library& library = runtime_->library;
    const std::string doing = "cannot open " + name_;
    ort::Status* failed = nullptr;
    if (runtime_->environment.pool_fits()) failed = open(path, backend, true);
    // Own threads: another size than the pool's, or no pool.
    if (session_ == nullptr) {
      if (failed != nullptr) library.api().ReleaseStatus(failed);
      library.check(open(path, backend, false), doing);
    }
    try {
      inputs_ = names(library.api().SessionGetInputCount, library.api().SessionGetInputName, doing);
      outputs_ = names(library.api().SessionGetOutputCount, library.api().SessionGetOutputName, doing);
    } catch (...) {
      library.api().ReleaseSession(session_);
      throw;
    }
  }
  ~OnnxRuntimeGraph() override { runtime_->library.api().ReleaseSession(session_); }
  OnnxRuntimeGraph(const OnnxRuntimeGraph&) = delete;
  OnnxRuntimeGraph& operator=(const OnnxRuntimeGraph&) = delete;

  TensorMap run(const TensorMap& inputs, const TensorMap& outputs) const override {
    return on_device_ ? run_on_device(inputs, outputs) : run_on_host(inputs, outputs);
  }

  ort::Session* session() const { return session_; }

 private:
  using Counter = ort::Status* (*)(const ort::Session*, size_t*);
  using Namer = ort::Status* (*)(const ort::Session*, size_t, ort::Allocator*, char**);

  ort::Status* open(const std::filesystem::path& path, const BackendOptions& backend, bool shares_pool) {
    const Library& library = runtime_->library;
    const Api& api = library.api();
    const std::string doing = "cannot open " + name_;
    ort::SessionOptions* made = nullptr;
    library.check(api.CreateSessionOptions(&made), doing);
    const std::unique_ptr<ort::SessionOptions, void (*)(ort::SessionOptions*)> options(made, api.ReleaseSessionOptions);
    library.check(api.SetSessionLogSeverityLevel(options.get(), ort::kLogError), doing);
    if (shares_pool) {
      library.check(api.DisablePerSessionThreads(options.get()), doing);
    } else {
      // As the pool's, they do not spin.
      library.check(api.AddSessionConfigEntry(options.get(), "session.intra_op.allow_spinning", "0"), doing);
      if (backend.threads > 0) library.check(api.SetIntraOpNumThreads(options.get(), backend.threads), doing);
    }
    if (!backend.fuse_quantized) {
      library.check(api.AddSessionConfigEntry(options.get(), "session.disable_quant_qdq", "1"), doing);
    }
    if (on_device_) {
      ort::CudaProviderOptions* cuda = nullptr;
      library.check(api.CreateCUDAProviderOptions(&cuda), doing);
      const std::unique_ptr<ort::CudaProviderOptions, void (*)(ort::CudaProviderOptions*)> released(
          cuda, api.ReleaseCUDAProviderOptions);
      library.check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options.get(), cuda),
                    "cannot use CUDA: check the driver, CUDA and cuDNN, or run with the provider cpu");
    }
    return api.CreateSession(runtime_->environment.get(), path.c_str(), options.get(), &session_);
  }

  std::vector<std::string> names(Counter count, Namer name_of, const std::string& doing) const {
    const Library& library = runtime_->library;
    ort::Allocator* allocator = nullptr;
    library.check(library.api().GetAllocatorWithDefaultOptions(&allocator), doing);
    size_t number = 0;
    library.check(count(session_, &number), doing);
    std::vector<std::string> found;
    for (size_t index = 0; index < number; ++index) {
      char* name = nullptr;
      library.check(name_of(session_, index, allocator, &name), doing);
      found.emplace_back(name);
      library.check(library.api().AllocatorFree(allocator, name), doing);
    }
    return found;
  }

  const Tensor& input(const TensorMap& inputs, const std::string& name) const {
    const auto found = inputs.find(name);
    if (found != inputs.end()) return found->second;
    throw BackendError(name_ + " takes '" + name + "', which the manifest does not announce: export the bundle again");
  }

  TensorMap run_on_host(const TensorMap& inputs, const TensorMap& outputs) const {
    const Library& library = runtime_->library;
    std::vector<Value> given, bound;
    std::vector<const char*> input_names, output_names;
    std::vector<const ort::Value*> input_values;
    for (const std::string& name : inputs_) {
      given.emplace_back(*runtime_, input(inputs, name));
      input_names.push_back(name.c_str());
      input_values.push_back(given.back().get());
    }
    std::vector<ort::Value*> output_values;
    for (const std::string& name : outputs_) {
      output_names.push_back(name.c_str());
      const auto found = outputs.find(name);
      output_values.push_back(nullptr);
      if (found == outputs.end()) continue;
      bound.emplace_back(*runtime_, found->second);
      output_values.back() = bound.back().get();
    }
    library.check(library.api().Run(session_, nullptr, input_names.data(), input_values.data(), input_values.size(),
                                    output_names.data(), output_names.size(), output_values.data()),
                  "failed in " + name_);
    // Taken over before anything can throw.
    std::vector<Value> made;
    made.reserve(outputs_.size());
    for (size_t index = 0; index < outputs_.size(); ++index) {
      made.emplace_back(*runtime_, outputs.count(outputs_[index]) == 0 ? output_values[index] : nullptr);
    }
    TensorMap produced;
    for (size_t index = 0; index < outputs_.size(); ++index) {
      const std::string& name = outputs_[index];
      const auto found = outputs.find(name);
      produced.emplace(name, found != outputs.end() ? found->second
                                                    : tensor_of(runtime_, std::move(made[index]), name, Memory::host));
    }
    return produced;
  }

  TensorMap run_on_device(const TensorMap& inputs, const TensorMap& outputs) const {
    const Library& library = runtime_->library;
    const Api& api = library.api();
    const std::string doing = "failed in " + name_;
    ort::IoBinding* made = nullptr;
    library.check(api.CreateIoBinding(session_, &made), doing);
    const std::unique_ptr<ort::IoBinding, void (*)(ort::IoBinding*)> binding(made, api.ReleaseIoBinding);
    for (const std::string& name : inputs_) {
      const Value value(*runtime_, input(inputs, name));
      library.check(api.BindInput(binding.get(), name.c_str(), value.get()), doing);
    }
    for (const std::string& name : outputs_) {
      const auto found = outputs.find(name);
      if (found == outputs.end()) {
        library.check(api.BindOutputToDevice(binding.get(), name.c_str(), runtime_->device), doing);
      } else {
        const Value value(*runtime_, found->second);
        library.check(api.BindOutput(binding.get(), name.c_str(), value.get()), doing);
      }
    }
    library.check(api.RunWithBinding(session_, nullptr, binding.get()), doing);
    ort::Allocator* allocator = nullptr;
    library.check(api.GetAllocatorWithDefaultOptions(&allocator), doing);
    ort::Value** values = nullptr;
    size_t count = 0;
    library.check(api.GetBoundOutputValues(binding.get(), allocator, &values, &count), doing);
    std::vector<Value> taken;
    for (size_t index = 0; index < count; ++index) taken.emplace_back(*runtime_, values[index]);
    library.check(api.AllocatorFree(allocator, values), doing);
    TensorMap produced;
    for (size_t index = 0; index < count; ++index) {
      const std::string& name = outputs_[index];
      const auto found = outputs.find(name);
      produced.emplace(name, found != outputs.end() ? found->second
                                                    : tensor_of(runtime_, std::move(taken[index]), name, Memory::device));
    }
    return produced;
  }

  RuntimePointer runtime_;
  std::string name_;
  bool on_device_;
  ort::Session* session_ = nullptr;
  std::vector<std::string> inputs_;
  std::vector<std::string> outputs_;
};

class OnnxRuntimeBackend : public Backend {
 public:
  explicit OnnxRuntimeBackend(const BackendOptions& options) : options_(options) {
    if (options.provider != "cpu" && options.provider != "cuda") {
      throw BackendError("provider '" + options.provider + "' is unknown, known: cpu, cuda");
    }
    runtime_ = std::make_shared<Runtime>(options.library, options.threads);
    if (options.provider == "cuda") {
      const std::vector<std::string> providers = runtime_->library.providers();
      if (std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") == providers.end()) {
        std::string has;
        for (const std::string& name : providers) has += (has.empty() ? "" : ", ") + name;
        throw BackendError("this onnxruntime has no CUDAExecutionProvider (it has " + has +
                           "): install ONNX Runtime built with CUDA and name it with EDGEPRUNE_ONNXRUNTIME");
      }
      copy_ = std::make_shared<DeviceCopy>();
    }
  }

  std::unique_ptr<Graph> load(const Bundle& bundle, const std::string& name) override {
    return std::make_unique<OnnxRuntimeGraph>(runtime_, bundle.file(bundle.manifest().graphs.at(name).file), options_);
  }

  // On the CPU, opening is the work of one thread: it lays out the weights for the kernels.
  int loads_at_once() const override {
    if (copy_ != nullptr) return 1;
    return options_.threads > 0 ? options_.threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  }

  std::optional<int64_t> longest_sequence(const Bundle&) override { return std::nullopt; }

  Tensor allocate(Shape shape, DataType type) override {
    return copy_ == nullptr ? host_tensor(std::move(shape), type) : copy_->allocate(std::move(shape), type);
  }

  // ONNX Runtime takes inputs to its device by itself.
  Tensor upload(const Tensor& tensor) override { return tensor; }

  Tensor download(const Tensor& tensor) override {
    return tensor.memory == Memory::host ? tensor : copy_->download(tensor);
  }

 private:
  BackendOptions options_;
  RuntimePointer runtime_;
  std::shared_ptr<DeviceCopy> copy_;
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const BackendOptions& options) {
  return std::make_unique<OnnxRuntimeBackend>(options);
}

}  // namespace edgeprune
