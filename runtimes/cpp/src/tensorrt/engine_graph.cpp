#include "tensorrt/engine_graph.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

#include "error.h"
#include "tensorrt/engine_file.h"

namespace edgeprune {
namespace {

constexpr const char* kLess = "close other programs that use the GPU, or build with --profiles one and a lower --max-sequence";
constexpr const char* kAgain =
    "build the engines again with edgeprune build BUNDLE --target this, or run with --backend onnxruntime";

// What TensorRT says itself when a call of a context fails without a word in the log.
struct CallFailed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

bool is_out_of_memory(std::string reason) {
  std::string letters;
  for (const char character : reason) {
    if (character != ' ') letters += static_cast<char>(std::tolower(static_cast<unsigned char>(character)));
  }
  return letters.find("outofmemory") != std::string::npos;
}

std::optional<DataType> type_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
      return DataType::float32;
    case nvinfer1::DataType::kHALF:
      return DataType::float16;
    case nvinfer1::DataType::kINT64:
      return DataType::int64;
    default:
      return std::nullopt;
  }
}

const char* name_of(const std::optional<DataType>& type) {
  if (!type) return "another type";
  switch (*type) {
    case DataType::float32:
      return "float32";
    case DataType::float16:
      return "float16";
    case DataType::int64:
      return "int64";
  }
  return "another type";
}

Shape shape_of(const nvinfer1::Dims& dims) { return {dims.d, dims.d + std::max(0, dims.nbDims)}; }

nvinfer1::Dims dims_of(const Shape& shape) {
  nvinfer1::Dims dims{};
  dims.nbDims = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

// As Python writes a tuple.
std::string shown(const Shape& shape) {
  std::string text = "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

void require(bool said_yes, const std::string& what) {
  if (!said_yes) throw CallFailed(what);
}

std::unique_ptr<nvinfer1::ICudaEngine> deserialized(TensorRtRuntime& runtime, const std::filesystem::path& path,
                                                    const EngineEntry& entry) {
  const EngineFile file(path, entry.file);
  runtime.log.clear();
  std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime.runtime->deserializeCudaEngine(file.data(), file.size()));
  if (engine != nullptr) return engine;
  std::string reason = runtime.log.first();
  if (reason.empty()) reason = "no reason given";
  throw BackendError(runtime.name() + " does not take the engine " + path.filename().string() + " (" + reason + "): " +
                     (is_out_of_memory(reason) ? kLess : kBuildEngineAgain));
}

}  // namespace

bool EngineGraph::EngineTensor::is_dynamic() const { return std::find(shape.begin(), shape.end(), -1) != shape.end(); }

EngineGraph::EngineGraph(std::shared_ptr<TensorRtRuntime> runtime, const std::filesystem::path& path, std::string name,
                         const GraphEntry& graph, const EngineEntry& entry)
    : runtime_(std::move(runtime)), name_(std::move(name)), profiles_(entry.profiles), places_(dimension_places(graph)) {
  const cuda::Driver::Current current(runtime_->device.driver());
  engine_ = deserialized(*runtime_, path, entry);
  for (int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
    const char* tensor = engine_->getIOTensorName(index);
    const EngineTensor found{tensor, type_of(engine_->getTensorDataType(tensor)), shape_of(engine_->getTensorShape(tensor)),
                             engine_->getTensorLocation(tensor) == nvinfer1::TensorLocation::kHOST};
    (engine_->getTensorIOMode(tensor) == nvinfer1::TensorIOMode::kINPUT ? inputs_ : outputs_).push_back(found);
  }
  runtime_->arena.reserve(static_cast<size_t>(std::max<int64_t>(0, engine_->getDeviceMemorySizeV2())));
}

EngineGraph::~EngineGraph() {
  const cuda::Driver::Current current(runtime_->device.driver());
  // A context may still be at work.
  runtime_->device.driver().stream_synchronize(runtime_->device.stream());
  contexts_.clear();
  engine_.reset();
}

TensorMap EngineGraph::run(const TensorMap& inputs, const TensorMap& outputs) const {
  const TensorMap read = reads(inputs);
  const size_t profile = choose_profile(name_, profiles_, sizes(inputs));
  CudaDevice& device = runtime_->device;
  const cuda::Driver::Current current(device.driver());
  const std::lock_guard<std::mutex> lock(runtime_->enqueueing);
  runtime_->log.clear();
  try {
    nvinfer1::IExecutionContext& handle = *context(profile).handle;
    for (const EngineTensor& tensor : inputs_) {
      const Tensor& value = read.at(tensor.name);
      const char* name = tensor.name.c_str();
      if (tensor.is_dynamic()) {
        require(handle.setInputShape(name, dims_of(value.shape)), "'" + tensor.name + "' may not be " + shown(value.shape));
      }
      require(handle.setTensorAddress(name, value.address), "'" + tensor.name + "' may not be where it is");
    }
    TensorMap produced = place_outputs(handle, outputs);
    require(handle.enqueueV3(device.stream()), "");
    // What TensorRT takes from the host it has read when it returns; what it gives there is sure after a wait.
    const bool on_host = std::any_of(outputs_.begin(), outputs_.end(), [](const EngineTensor& tensor) { return tensor.on_host; });
    if (on_host) device.synchronize();
    return produced;
  } catch (const CallFailed& error) {
    fail(profile, error.what());
  }
}

// What the engine reads, each tensor where it reads it: on the device, or on the host.
TensorMap EngineGraph::reads(const TensorMap& inputs) const {
  TensorMap read;
  for (const EngineTensor& tensor : inputs_) {
    const auto found = inputs.find(tensor.name);
    if (found == inputs.end()) refuse_engine("the engine reads '" + tensor.name + "', which the bundle's graph does not");
    const Tensor& value = found->second;
    check(tensor, value);
    const Memory needed = tensor.on_host ? Memory::host : Memory::device;
    if (value.memory == needed) {
      read[tensor.name] = value;
    } else {
      read[tensor.name] = tensor.on_host ? runtime_->device.download(value) : runtime_->device.upload(value);
    }
  }
  return read;
}

DimensionSizes EngineGraph::sizes(const TensorMap& inputs) const {
  DimensionSizes sizes;
  for (const auto& [dimension, input, axis] : places_) {
    const auto found = inputs.find(input);
    if (found == inputs.end()) refuse_engine("the bundle's graph reads '" + input + "', which the chain does not give");
    const Tensor& tensor = found->second;
    if (axis) {
      if (*axis >= tensor.shape.size()) refuse_engine("'" + input + "' has " + std::to_string(tensor.shape.size()) + " axes here");
      sizes.emplace_back(dimension, tensor.shape[*axis]);
      continue;
    }
    // Known on the host already, unless a graph computed it.
    const Tensor value = tensor.memory == Memory::host ? tensor : runtime_->device.download(tensor);
    if (value.type != DataType::int64 || value.bytes() == 0) refuse_engine("'" + input + "' is no number here");
    sizes.emplace_back(dimension, *value.data<int64_t>());
  }
  return sizes;
}

TensorMap EngineGraph::place_outputs(nvinfer1::IExecutionContext& context, const TensorMap& given) const {
  TensorMap produced;
  for (const EngineTensor& tensor : outputs_) {
    const Shape shape = shape_of(context.getTensorShape(tensor.name.c_str()));
    if (std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; })) {
      refuse_engine("the size of '" + tensor.name + "' depends on data (" + shown(shape) + ")");
    }
    if (!tensor.type) refuse_engine("'" + tensor.name + "' is of a type that no bundle has");
    const auto place = given.find(tensor.name);
    if (place != given.end() && (element_count(place->second.shape) != element_count(shape) || tensor.on_host)) {
      refuse_engine("'" + tensor.name + "' has the shape " + shown(shape) + ", expected was " + shown(place->second.shape));
    }
    Tensor& output = produced[tensor.name];
    if (place != given.end()) {
      output = place->second;
    } else {
      output = tensor.on_host ? zero_tensor(shape, *tensor.type) : runtime_->device.allocate(shape, *tensor.type);
    }
    check(tensor, output);
    require(context.setTensorAddress(tensor.name.c_str(), output.address), "'" + tensor.name + "' may not be where it is");
  }
  return produced;
}

// TensorRT reads and writes wherever it is told to; a wrong type, size or address shows as a wrong answer or not at all.
void EngineGraph::check(const EngineTensor& tensor, const Tensor& value) const {
  if (value.type != tensor.type) {
    refuse_engine("'" + tensor.name + "' is " + name_of(tensor.type) + " to the engine and " + name_of(value.type) + " here");
  }
  bool fits = value.shape.size() == tensor.shape.size();
  for (size_t axis = 0; fits && axis < tensor.shape.size(); ++axis) {
    fits = tensor.shape[axis] == -1 || tensor.shape[axis] == value.shape[axis];
  }
  if (!fits) {
    refuse_engine("'" + tensor.name + "' is " + shown(tensor.shape) + " to the engine and " + shown(value.shape) + " here");
  }
  const auto address = reinterpret_cast<uintptr_t>(value.address);
  if (value.memory == Memory::device && (address == 0 || address % kDeviceAlignment != 0)) {
    throw std::logic_error(name_ + ": '" + tensor.name + "' is at an address that TensorRT does not take");
  }
}

EngineGraph::Context& EngineGraph::context(size_t profile) const {
  const auto known = contexts_.find(profile);
  if (known == contexts_.end()) {
    Context made;
    made.handle.reset(engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    require(made.handle != nullptr, "no execution context");
    const auto index = static_cast<int32_t>(profile);
    require(made.handle->setOptimizationProfileAsync(index, runtime_->device.stream()), "no such profile");
    contexts_.emplace(profile, std::move(made));
  }
  Context& context = contexts_.at(profile);
  const std::shared_ptr<void>& arena = runtime_->arena.block();
  if (context.arena != arena) {
    context.handle->setDeviceMemoryV2(arena.get(), static_cast<int64_t>(runtime_->arena.size()));
    context.arena = arena;
  }
  return context;
}

void EngineGraph::fail(size_t profile, const std::string& said) const {
  std::string reason = runtime_->log.first();
  if (reason.empty()) reason = said.empty() ? "no reason given" : said;
  throw BackendError(runtime_->name() + " failed in " + name_ + ", profile '" + profiles_[profile].name + "' (" + reason +
                     "): " + (is_out_of_memory(reason) ? kLess : kAgain));
}

void EngineGraph::refuse_engine(const std::string& difference) const {
  throw BackendError(name_ + ": " + difference + ": build the engines again with edgeprune build BUNDLE --target this");
}

}  // namespace edgeprune
