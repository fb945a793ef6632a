// libnvinfer.so's double: an "engine" is a note of the ONNX file that it stands for (tests/tensorrt_double.py writes it), and
// ONNX Runtime computes the graph.
//
// Every tensor of a run has an address of 256-byte alignment inside memory that is allocated; inputs lie inside the chosen
// profile's range and equal dimensions are equal; the scratch memory is set, large enough, and scribbled over by every run; a
// profile is used by one context at a time; a size that TensorRT needs on the host is read from the host, when the run is put
// on the stream. A context forgets all addresses with every run, so that nothing of an earlier one is left over.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "bundle/bundle.h"
#include "gpu_double.h"
#include "onnxruntime/onnxruntime_backend.h"
#include "unexpected_calls.h"

namespace {

using edgeprune::Bundle;
using edgeprune::Json;
using edgeprune::Shape;
using edgeprune::Tensor;
using edgeprune::TensorMap;
using gpu_double::demand;
using gpu_double::note;

constexpr const char* kMagic = "double of an engine";
constexpr const char* kNumKeep = "num_keep";
constexpr uintptr_t kAlignment = 256;
constexpr int kGarbage = 0xFF;
constexpr nvinfer1::ILogger::Severity kError = nvinfer1::ILogger::Severity::kERROR;

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + dims.nbDims}; }

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

struct IoTensor {
  std::string name;
  edgeprune::DataType type;
  std::vector<edgeprune::Dimension> shape;
  bool on_host;

  Shape declared() const {
    Shape sizes;
    for (const auto& [dimension, size] : shape) sizes.push_back(dimension.empty() ? size : -1);
    return sizes;
  }
  size_t bytes(const Shape& actual) const {
    return static_cast<size_t>(edgeprune::element_count(actual)) * edgeprune::element_bytes(type);
  }
};

// ONNX Runtime's graphs, each opened once.
std::shared_ptr<edgeprune::Graph> computed(const std::string& onnx, const std::string& name) {
  struct Opened {
    explicit Opened(const std::filesystem::path& folder) : bundle(folder) {
      edgeprune::BackendOptions options;
      options.threads = 1;
      backend = edgeprune::open_onnxruntime(options);
    }
    Bundle bundle;
    std::unique_ptr<edgeprune::Backend> backend;
    std::map<std::string, std::shared_ptr<edgeprune::Graph>> graphs;
  };
  // Never destroyed: it is used until the process ends.
  static auto* bundles = new std::map<std::string, Opened>;
  const std::string folder = std::filesystem::path(onnx).parent_path().string();
  Opened& opened = bundles->try_emplace(folder, folder).first->second;
  std::shared_ptr<edgeprune::Graph>& graph = opened.graphs[name];
  if (graph == nullptr) graph = opened.backend->load(opened.bundle, name);
  return graph;
}

struct Engine {
  std::string graph_name, fails;
  std::vector<IoTensor> inputs, outputs;
  std::vector<std::pair<std::string, std::map<std::string, std::pair<int64_t, int64_t>>>> profiles;
  int64_t scratch = 0;
  std::shared_ptr<edgeprune::Graph> graph;
  std::set<int> profiles_in_use;
  nvinfer1::ILogger* log = nullptr;

  Engine(const Json& data, nvinfer1::ILogger* logger)
      : graph_name(data.at("graph")),
        fails(data.at("fails")),
        scratch(data.at("scratch")),
        graph(computed(data.at("onnx"), graph_name)),
        log(logger) {
    for (const char* kind : {"inputs", "outputs"}) {
      for (const Json& tensor : data.at(kind)) {
        IoTensor entry{tensor.at("name"), edgeprune::data_type(tensor.at("dtype")), {}, false};
        const Json& on_host = data.at("on_host");
        entry.on_host = std::find(on_host.begin(), on_host.end(), Json(entry.name)) != on_host.end();
        for (const Json& size : tensor.at("shape")) {
          entry.shape.push_back(size.is_string() ? edgeprune::Dimension{size.get<std::string>(), 0}
                                                 : edgeprune::Dimension{"", size.get<int64_t>()});
        }
        (kind == std::string("inputs") ? inputs : outputs).push_back(std::move(entry));
      }
    }
    for (const Json& profile : data.at("profiles")) {
      profiles.emplace_back(profile.at("name").get<std::string>(), std::map<std::string, std::pair<int64_t, int64_t>>());
      for (const auto& [dimension, range] : profile.at("ranges").items()) {
        profiles.back().second[dimension] = {range[0], range[2]};
      }
    }
  }

  const IoTensor& tensor(const std::string& name) const {
    for (const std::vector<IoTensor>* tensors : {&inputs, &outputs}) {
      for (const IoTensor& one : *tensors) {
        if (one.name == name) return one;
      }
    }
    gpu_double::violation(graph_name + " has no tensor '" + name + "'");
  }
};

class ContextDouble final : public nvinfer1::UnexpectedVExecutionContext {
 public:
  explicit ContextDouble(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {
    for (const IoTensor& tensor : engine_->inputs) {
      const Shape declared = tensor.declared();
      if (std::find(declared.begin(), declared.end(), -1) == declared.end()) shapes_[tensor.name] = declared;
    }
  }
  ~ContextDouble() override {
    if (profile_) engine_->profiles_in_use.erase(*profile_);
  }

  bool setOptimizationProfileAsync(int32_t index, cudaStream_t stream) noexcept override {
    gpu_double::check_stream(stream);
    if (index < 0 || static_cast<size_t>(index) >= engine_->profiles.size()) return false;
    demand(engine_->profiles_in_use.insert(index).second, "two contexts of " + engine_->graph_name + " use a profile");
    profile_ = index;
    note("context " + engine_->graph_name + " " + profile().first);
    return true;
  }

  void setDeviceMemoryV2(void* memory, int64_t size) noexcept override {
    demand(reinterpret_cast<uintptr_t>(memory) % kAlignment == 0, "scratch memory is not aligned");
    demand(size >= engine_->scratch, "the scratch memory is too small for " + engine_->graph_name);
    gpu_double::check_range("scratch memory", memory, static_cast<size_t>(size));
    scratch_ = {static_cast<char*>(memory), static_cast<size_t>(size)};
  }

  bool setInputShape(char const* name, nvinfer1::Dims const& dims) noexcept override {
    engine_->tensor(name);
    shapes_[name] = shape_of(dims);
    return true;
  }

  bool setTensorAddress(char const* name, void* data) noexcept override {
    engine_->tensor(name);
    addresses_[name] = data;
    return true;
  }

  // Of an output, from the sizes of the inputs, before anything runs.
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override { return dims_of(output_shapes().at(name)); }

  // Checks everything that TensorRT would, and puts the run on the stream.
  bool enqueueV3(cudaStream_t stream) noexcept override {
    gpu_double::check_stream(stream);
    demand(scratch_.first != nullptr, "no scratch memory was set");
    std::map<std::string, Shape> shapes = output_shapes();
    shapes.insert(shapes_.begin(), shapes_.end());
    if (!engine_->fails.empty()) {
      if (engine_->fails == "says no") engine_->log->log(kError, "a kernel\nfailed");
      return false;
    }
    note("run " + engine_->graph_name + " " + profile().first);
    TensorMap inputs;
    for (const IoTensor& tensor : engine_->inputs) inputs[tensor.name] = placed(tensor, shapes.at(tensor.name));
    std::vector<std::pair<IoTensor, Tensor>> outputs;
    for (const IoTensor& tensor : engine_->outputs) outputs.emplace_back(tensor, placed(tensor, shapes.at(tensor.name)));
    // Of an output on the host the value is known without the device; of an input on the host it was read already.
    if (std::any_of(engine_->outputs.begin(), engine_->outputs.end(), [](const IoTensor& tensor) { return tensor.on_host; })) {
      const TensorMap known = engine_->graph->run(zeros(), {});
      for (const auto& [tensor, place] : outputs) {
        if (tensor.on_host) std::memcpy(place.address, known.at(tensor.name).address, place.bytes());
      }
    }
    gpu_double::put_on_stream([engine = engine_, inputs, outputs, scratch = scratch_] {
      std::memset(scratch.first, kGarbage, scratch.second);
      const TensorMap produced = engine->graph->run(inputs, {});
      for (const auto& [tensor, place] : outputs) {
        const Tensor& value = produced.at(tensor.name);
        demand(value.shape == place.shape, engine->graph_name + " gives another shape of '" + tensor.name + "'");
        if (!tensor.on_host && value.bytes() > 0) std::memcpy(place.address, value.address, value.bytes());
      }
    });
    addresses_.clear();
    return true;
  }

 private:
  const std::pair<std::string, std::map<std::string, std::pair<int64_t, int64_t>>>& profile() const {
    demand(profile_.has_value(), "no profile was chosen");
    return engine_->profiles[static_cast<size_t>(*profile_)];
  }

  // Size by dimension; equal dimensions are equal, and in the range of the profile.
  std::map<std::string, int64_t> sizes() const {
    std::map<std::string, int64_t> sizes;
    for (const IoTensor& tensor : engine_->inputs) {
      const auto found = shapes_.find(tensor.name);
      demand(found != shapes_.end(), "the shape of '" + tensor.name + "' was not said");
      demand(found->second.size() == tensor.shape.size(), "'" + tensor.name + "' has another number of axes");
      for (size_t axis = 0; axis < tensor.shape.size(); ++axis) {
        const auto& [dimension, fixed] = tensor.shape[axis];
        const int64_t size = found->second[axis];
        const int64_t expected = dimension.empty() ? fixed : sizes.try_emplace(dimension, size).first->second;
        demand(size == expected, engine_->graph_name + ": '" + tensor.name + "' has the size " + std::to_string(size) +
                                     " where " + std::to_string(expected) + " is due");
      }
      if (tensor.name == kNumKeep && tensor.on_host) sizes[kNumKeep] = host_value(kNumKeep);
    }
    for (const auto& [dimension, range] : profile().second) {
      const auto found = sizes.find(dimension);
      // TensorRT has a range for a value only where it makes sizes of it.
      demand(found != sizes.end() || dimension == kNumKeep, "a profile has a range of '" + dimension + "'");
      if (found == sizes.end()) continue;
      demand(range.first <= found->second && found->second <= range.second,
             engine_->graph_name + ": " + dimension + " is outside of the profile");
    }
    return sizes;
  }

  int64_t host_value(const std::string& name) const {
    const auto found = addresses_.find(name);
    demand(found != addresses_.end() && found->second != nullptr, "'" + name + "' has no address");
    demand(!gpu_double::is_on_device(found->second), "'" + name + "' must be on the host");
    return *static_cast<const int64_t*>(found->second);
  }

  TensorMap zeros() const {
    TensorMap inputs;
    for (const IoTensor& tensor : engine_->inputs) {
      inputs[tensor.name] = tensor.on_host ? edgeprune::int64_tensor({host_value(tensor.name)}, {})
                                           : edgeprune::zero_tensor(shapes_.at(tensor.name), tensor.type);
    }
    return inputs;
  }

  std::map<std::string, Shape> output_shapes() const {
    const std::map<std::string, int64_t> known = sizes();
    std::map<std::string, Shape> shapes;
    std::optional<TensorMap> run;
    for (const IoTensor& tensor : engine_->outputs) {
      Shape shape;
      for (const auto& [dimension, size] : tensor.shape) shape.push_back(dimension.empty() ? size : sum_of(dimension, known));
      if (std::find(shape.begin(), shape.end(), -1) != shape.end()) {
        // The bundle does not say it: a run with zeros does, because no size depends on data.
        if (!run) run = engine_->graph->run(zeros(), {});
        shape = run->at(tensor.name).shape;
      }
      shapes[tensor.name] = shape;
    }
    return shapes;
  }

  // Such as "past + sequence"; -1 where a size is not known.
  static int64_t sum_of(const std::string& dimension, const std::map<std::string, int64_t>& known) {
    int64_t sum = 0;
    for (size_t at = 0; at <= dimension.size();) {
      const size_t end = std::min(dimension.find(" + ", at), dimension.size());
      const auto found = known.find(dimension.substr(at, end - at));
      if (found == known.end()) return -1;
      sum += found->second;
      at = end + 3;
    }
    return sum;
  }

  // Where a tensor lies, as a tensor of the host; one that is read on the host is a copy.
  Tensor placed(const IoTensor& tensor, const Shape& shape) const {
    const auto found = addresses_.find(tensor.name);
    demand(found != addresses_.end() && found->second != nullptr, "'" + tensor.name + "' has no address");
    void* address = found->second;
    if (!tensor.on_host) {
      demand(reinterpret_cast<uintptr_t>(address) % kAlignment == 0, "'" + tensor.name + "' is not aligned");
      gpu_double::check_range("'" + tensor.name + "'", address, tensor.bytes(shape));
      return {address, shape, tensor.type, edgeprune::Memory::host, nullptr};
    }
    demand(!gpu_double::is_on_device(address), "'" + tensor.name + "' must be on the host");
    const auto is_it = [&](const IoTensor& input) { return input.name == tensor.name; };
    const bool is_output = std::none_of(engine_->inputs.begin(), engine_->inputs.end(), is_it);
    if (is_output) return {address, shape, tensor.type, edgeprune::Memory::host, nullptr};
    return edgeprune::int64_tensor({*static_cast<const int64_t*>(address)}, shape);
  }

  std::shared_ptr<Engine> engine_;
  std::optional<int> profile_;
  std::pair<char*, size_t> scratch_{nullptr, 0};
  std::map<std::string, Shape> shapes_;
  std::map<std::string, void*> addresses_;
};

// The header's classes forward to what mImpl names.
template <typename Public, typename Double>
class Handle final : public Public {
 public:
  template <typename... Arguments>
  explicit Handle(Arguments&&... arguments) : own_(std::forward<Arguments>(arguments)...) {
    this->mImpl = &own_;
  }

 private:
  Double own_;
};

class EngineDouble final : public nvinfer1::UnexpectedVCudaEngine {
 public:
  explicit EngineDouble(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  int32_t getNbIOTensors() const noexcept override {
    return static_cast<int32_t>(engine_->inputs.size() + engine_->outputs.size());
  }
  char const* getIOTensorName(int32_t index) const noexcept override {
    const auto at = static_cast<size_t>(index);
    const size_t inputs = engine_->inputs.size();
    return (at < inputs ? engine_->inputs[at] : engine_->outputs[at - inputs]).name.c_str();
  }
  nvinfer1::DataType getTensorDataType(char const* name) const noexcept override {
    switch (engine_->tensor(name).type) {
      case edgeprune::DataType::float32:
        return nvinfer1::DataType::kFLOAT;
      case edgeprune::DataType::float16:
        return nvinfer1::DataType::kHALF;
      case edgeprune::DataType::int64:
        return nvinfer1::DataType::kINT64;
    }
    return nvinfer1::DataType::kBOOL;
  }
  nvinfer1::Dims getTensorShape(char const* name) const noexcept override { return dims_of(engine_->tensor(name).declared()); }
  nvinfer1::TensorLocation getTensorLocation(char const* name) const noexcept override {
    return engine_->tensor(name).on_host ? nvinfer1::TensorLocation::kHOST : nvinfer1::TensorLocation::kDEVICE;
  }
  nvinfer1::TensorIOMode getTensorIOMode(char const* name) const noexcept override {
    const auto is_input = [&](const IoTensor& input) { return input.name == name; };
    return std::any_of(engine_->inputs.begin(), engine_->inputs.end(), is_input) ? nvinfer1::TensorIOMode::kINPUT
                                                                                 : nvinfer1::TensorIOMode::kOUTPUT;
  }
  int64_t getDeviceMemorySizeV2() const noexcept override { return engine_->scratch; }
  nvinfer1::IExecutionContext* createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy strategy) noexcept override {
    demand(strategy == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED, "a context with scratch memory of its own");
    return new Handle<nvinfer1::IExecutionContext, ContextDouble>(engine_);
  }

 private:
  std::shared_ptr<Engine> engine_;
};

class RuntimeDouble final : public nvinfer1::UnexpectedVRuntime {
 public:
  explicit RuntimeDouble(nvinfer1::ILogger* log) : log_(log) {}

  nvinfer1::ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept override {
    const auto* text = static_cast<const char*>(blob);
    const Json data = Json::parse(text, text + size, nullptr, false);
    if (!data.is_object() || data.value("magic", "") != kMagic) {
      log_->log(kError, "Assertion bufferSize >= minBufferSize failed");
      log_->log(kError, "another one that follows from it");
      return nullptr;
    }
    if (data.at("fails") == "memory") {
      log_->log(kError, "Error Code 2: OutOfMemory (Requested size was 5 bytes.)");
      return nullptr;
    }
    note("engine " + data.at("graph").get<std::string>());
    return new Handle<nvinfer1::ICudaEngine, EngineDouble>(std::make_shared<Engine>(data, log_));
  }

 private:
  nvinfer1::ILogger* log_;
};

class RegistryDouble final : public nvinfer1::UnexpectedIPluginRegistry {
 public:
  PluginLibraryHandle loadLibrary(nvinfer1::AsciiChar const* path) noexcept override {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    nvinfer1::IPluginCreatorInterface* const* (*creators)(int32_t&) = nullptr;
    void* symbol = dlsym(library, "getCreators");
    if (symbol == nullptr) return nullptr;
    std::memcpy(&creators, &symbol, sizeof creators);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* found = creators(count);
    all_.assign(found, found + count);
    note("plugins " + std::to_string(count));
    return library;
  }
  nvinfer1::IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(all_.size());
    return all_.data();
  }

 private:
  std::vector<nvinfer1::IPluginCreatorInterface*> all_;
};

int version_part(size_t place) {
  const char* given = std::getenv("EDGEPRUNE_DOUBLE_VERSION");
  int parts[4] = {NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR, NV_TENSORRT_PATCH, NV_TENSORRT_BUILD};
  if (given != nullptr) std::sscanf(given, "%d.%d.%d.%d", &parts[0], &parts[1], &parts[2], &parts[3]);
  return parts[place];
}

}  // namespace

extern "C" {

EDGEPRUNE_DOUBLE int32_t getInferLibMajorVersion() noexcept { return version_part(0); }
EDGEPRUNE_DOUBLE int32_t getInferLibMinorVersion() noexcept { return version_part(1); }
EDGEPRUNE_DOUBLE int32_t getInferLibPatchVersion() noexcept { return version_part(2); }
EDGEPRUNE_DOUBLE int32_t getInferLibBuildVersion() noexcept { return version_part(3); }

EDGEPRUNE_DOUBLE void* createInferRuntime_INTERNAL(void* logger, int32_t version) noexcept {
  auto* log = static_cast<nvinfer1::ILogger*>(logger);
  demand(version == NV_TENSORRT_VERSION, "another version of the headers");
  if (100 * version_part(0) + version_part(1) < 100 * NV_TENSORRT_MAJOR + NV_TENSORRT_MINOR) {
    log->log(kError, "The headers are newer than the library");
    return nullptr;
  }
  return new Handle<nvinfer1::IRuntime, RuntimeDouble>(log);
}

EDGEPRUNE_DOUBLE nvinfer1::IPluginRegistry* getPluginRegistry() noexcept {
  static auto* registry = new RegistryDouble;
  return registry;
}

}  // extern "C"
