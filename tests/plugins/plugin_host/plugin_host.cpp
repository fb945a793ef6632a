// Drives plugin objects as TensorRT does, for a test in Python: creators, capabilities, clones, serialization, shapes,
// types and runs. What it is compiled with are TensorRT's own headers; TensorRT itself is not there.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

class Log final : public ILogger {
 public:
  void log(Severity, const char* message) noexcept override { text += std::string(message) + "\n"; }
  std::string text;
};

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
  Log logger;
};

// A dimension with a value. TensorRT has symbols here; the plugins only pass them on.
class Dimension final : public IDimensionExpr, private apiv::VDimensionExpr {
 public:
  explicit Dimension(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value_; }
  bool isSizeTensor() const noexcept override { return false; }

 private:
  int64_t value_;
};

class Builder final : public IExprBuilder {
 public:
  Builder() { mImpl = nullptr; }
};

struct Host {
  IPluginCreatorInterface* const* creators;
  int32_t count;
  Finder finder;
  std::string log;

  IPluginCreatorV3One* creator(const char* name) const {
    for (int32_t i = 0; i < count; ++i) {
      auto* one = static_cast<IPluginCreatorV3One*>(creators[i]);
      if (!std::strcmp(one->getPluginName(), name)) return one;
    }
    return nullptr;
  }
};

template <typename Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild* build_of(void* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime_of(void* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

struct Field {
  const char* name;
  const void* data;
  int32_t type;
  int32_t length;
};

struct Tensor {
  int32_t type;
  int32_t format;
  int32_t rank;
  int64_t dims[8];
  void* data;
};

static PluginTensorDesc described(const Tensor& tensor) {
  PluginTensorDesc desc = {};
  desc.type = static_cast<DataType>(tensor.type);
  desc.format = static_cast<TensorFormat>(tensor.format);
  desc.dims.nbDims = tensor.rank;
  for (int32_t i = 0; i < tensor.rank; ++i) desc.dims.d[i] = tensor.dims[i];
  return desc;
}

static std::vector<DynamicPluginTensorDesc> ranges(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> all;
  for (int32_t i = 0; i < count; ++i) {
    DynamicPluginTensorDesc desc = {};
    desc.desc = described(tensors[i]);
    desc.min = desc.opt = desc.max = desc.desc.dims;
    all.push_back(desc);
  }
  return all;
}

// Null where the library cannot be loaded.
Host* host_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return nullptr;
  auto* get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
  auto* set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) return nullptr;
  auto* host = new Host;
  set(&host->finder);
  host->creators = get(host->count);
  return host;
}

int32_t host_creators(Host* host) { return host->count; }

// "name version namespace kind attribute,attribute,"
const char* host_describe(Host* host, int32_t i) {
  auto* creator = static_cast<IPluginCreatorV3One*>(host->creators[i]);
  host->log = std::string(creator->getPluginName()) + " " + creator->getPluginVersion() + " " +
              creator->getPluginNamespace() + " " + creator->getInterfaceInfo().kind + " ";
  for (int32_t f = 0; f < creator->getFieldNames()->nbFields; ++f) {
    host->log += std::string(creator->getFieldNames()->fields[f].name) + ",";
  }
  return host->log.c_str();
}

// What was logged since the last call.
const char* host_log(Host* host) {
  host->log = host->finder.logger.text;
  host->finder.logger.text.clear();
  return host->log.c_str();
}

void* host_create(Host* host, const char* name, const Field* fields, int32_t count) {
  std::vector<PluginField> all;
  for (int32_t i = 0; i < count; ++i) {
    all.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type), fields[i].length);
  }
  PluginFieldCollection collection{count, all.data()};
  return host->creator(name)->createPlugin("node", &collection, TensorRTPhase::kBUILD);
}

void* host_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

void* host_attach(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

// As an engine does: the fields are written, and a plugin is made of them later.
void* host_through_engine(Host* host, void* plugin) {
  const PluginFieldCollection* written = runtime_of(plugin)->getFieldsToSerialize();
  std::vector<std::string> names, bytes;
  std::vector<PluginField> read;
  for (int32_t i = 0; i < written->nbFields; ++i) {
    const PluginField& field = written->fields[i];
    const size_t size = field.type == PluginFieldType::kCHAR ? 1 : field.type == PluginFieldType::kINT64 ? 8 : 4;
    names.emplace_back(field.name);
    bytes.emplace_back(static_cast<const char*>(field.data), size * field.length);
  }
  for (int32_t i = 0; i < written->nbFields; ++i) {
    read.emplace_back(names[i].c_str(), bytes[i].data(), written->fields[i].type, written->fields[i].length);
  }
  PluginFieldCollection collection{static_cast<int32_t>(read.size()), read.data()};
  const char* name = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginName();
  return host->creator(name)->createPlugin("node", &collection, TensorRTPhase::kRUNTIME);
}

void host_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

const char* host_metadata(void* plugin) { return build_of(plugin)->getMetadataString(); }

int32_t host_outputs(void* plugin) { return build_of(plugin)->getNbOutputs(); }

// Fills in the outputs' types and shapes; the error code otherwise.
int32_t host_infer(void* plugin, const Tensor* inputs, int32_t count, Tensor* outputs, int32_t num_outputs) {
  std::vector<DataType> types(count), output_types(num_outputs);
  std::vector<std::unique_ptr<Dimension>> sizes;
  std::vector<DimsExprs> shapes(count), output_shapes(num_outputs);
  for (int32_t i = 0; i < count; ++i) {
    types[i] = static_cast<DataType>(inputs[i].type);
    shapes[i].nbDims = inputs[i].rank;
    for (int32_t d = 0; d < inputs[i].rank; ++d) {
      sizes.push_back(std::make_unique<Dimension>(inputs[i].dims[d]));
      shapes[i].d[d] = sizes.back().get();
    }
  }
  Builder builder;
  if (const int32_t code = build_of(plugin)->getOutputDataTypes(output_types.data(), num_outputs, types.data(), count)) {
    return code;
  }
  if (const int32_t code = build_of(plugin)->getOutputShapes(shapes.data(), count, nullptr, 0, output_shapes.data(),
                                                             num_outputs, builder)) {
    return code;
  }
  for (int32_t i = 0; i < num_outputs; ++i) {
    outputs[i].type = static_cast<int32_t>(output_types[i]);
    outputs[i].rank = output_shapes[i].nbDims;
    for (int32_t d = 0; d < outputs[i].rank; ++d) outputs[i].dims[d] = output_shapes[i].d[d]->getConstantValue();
  }
  return 0;
}

int32_t host_supports(void* plugin, int32_t position, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  return build_of(plugin)->supportsFormatCombination(position, ranges(tensors, inputs + outputs).data(), inputs,
                                                     outputs);
}

int32_t host_configure(void* plugin, const Tensor* inputs, int32_t count, const Tensor* outputs, int32_t num_outputs) {
  return build_of(plugin)->configurePlugin(ranges(inputs, count).data(), count, ranges(outputs, num_outputs).data(),
                                           num_outputs);
}

int64_t host_workspace(void* plugin, const Tensor* inputs, int32_t count, const Tensor* outputs, int32_t num_outputs) {
  return static_cast<int64_t>(build_of(plugin)->getWorkspaceSize(
      ranges(inputs, count).data(), count, ranges(outputs, num_outputs).data(), num_outputs));
}

int32_t host_run(void* plugin, const Tensor* inputs, int32_t count, const Tensor* outputs, int32_t num_outputs,
                 void* workspace) {
  std::vector<PluginTensorDesc> in, out;
  std::vector<const void*> sources;
  std::vector<void*> targets;
  for (int32_t i = 0; i < count; ++i) {
    in.push_back(described(inputs[i]));
    sources.push_back(inputs[i].data);
  }
  for (int32_t i = 0; i < num_outputs; ++i) {
    out.push_back(described(outputs[i]));
    targets.push_back(outputs[i].data);
  }
  if (const int32_t code = runtime_of(plugin)->onShapeChange(in.data(), count, out.data(), num_outputs)) return code;
  return runtime_of(plugin)->enqueue(in.data(), out.data(), sources.data(), targets.data(), workspace, nullptr);
}

}  // extern "C"
