#include "operator_plugin.h"

#include <exception>
#include <limits>
#include <vector>

#include "plugin_log.h"
#include "plugin_version.h"

namespace edgeprune {

using nvinfer1::DataType;
using nvinfer1::PluginCapabilityType;

nvinfer1::IPluginCapability* OperatorPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

const char* OperatorPlugin::getPluginVersion() const noexcept { return EDGEPRUNE_PLUGIN_VERSION; }
const char* OperatorPlugin::getPluginNamespace() const noexcept { return EDGEPRUNE_PLUGIN_NAMESPACE; }

int32_t OperatorPlugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                                        const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept {
  if (inputs != num_inputs() || outputs != getNbOutputs()) return fail("has another number of inputs or outputs");
  const std::string reason = beyond_limits(in);
  return reason.empty() ? 0 : fail(reason);
}

int32_t OperatorPlugin::getOutputDataTypes(DataType* output_types, int32_t outputs, const DataType* input_types,
                                           int32_t inputs) const noexcept {
  if (inputs != num_inputs() || outputs != getNbOutputs()) return fail("has another number of inputs or outputs");
  for (int32_t i = 0; i < inputs; ++i) {
    if (!has_type(i, input_types)) return fail("input " + std::to_string(i) + " has a type that it does not take");
  }
  for (int32_t i = 0; i < outputs; ++i) output_types[i] = output_type(i, input_types);
  return 0;
}

int32_t OperatorPlugin::getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs_given,
                                        const nvinfer1::DimsExprs*, int32_t num_shape_inputs,
                                        nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                        nvinfer1::IExprBuilder& builder) noexcept {
  if (num_inputs_given != num_inputs() || num_shape_inputs != 0 || num_outputs != getNbOutputs()) {
    return fail("has another number of inputs or outputs");
  }
  for (int32_t i = 0; i < num_inputs_given; ++i) {
    if (!has_rank(i, inputs[i].nbDims)) {
      return fail("input " + std::to_string(i) + " has " + std::to_string(inputs[i].nbDims) + " dimensions");
    }
  }
  output_shapes(inputs, outputs, builder);
  return 0;
}

bool OperatorPlugin::supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                               int32_t inputs, int32_t outputs) noexcept {
  if (inputs != num_inputs() || outputs != getNbOutputs()) return false;
  if (tensors[position].desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  std::vector<DataType> types;
  for (int32_t i = 0; i <= position; ++i) types.push_back(tensors[i].desc.type);
  return has_type(position, types.data());
}

int32_t OperatorPlugin::onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                                      const nvinfer1::PluginTensorDesc*, int32_t) noexcept {
  for (int32_t i = 0; i < inputs; ++i) {
    if (!has_rank(i, in[i].dims.nbDims)) return fail("input " + std::to_string(i) + " has another rank");
  }
  return 0;
}

int32_t OperatorPlugin::enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                                const void* const* input_data, void* const* output_data, void* workspace,
                                cudaStream_t stream) noexcept {
  try {
    const cudaError_t error = run(inputs, outputs, input_data, output_data, workspace, stream);
    if (error == cudaSuccess) return 0;
    return fail("its kernels returned CUDA error " + std::to_string(static_cast<int>(error)) +
                (error == cudaErrorInvalidValue ? ": the sizes are not valid or too large" : ""));
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}

const nvinfer1::PluginFieldCollection* OperatorPlugin::getFieldsToSerialize() noexcept {
  try {
    return attributes_.fields();
  } catch (const std::exception& error) {
    fail(error.what());
    return nullptr;
  }
}

int32_t OperatorPlugin::fail(const std::string& message) const noexcept {
  report_error(name_, message);
  return 1;
}

bool is_element_type(DataType type) {
  return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

ElementType element_type(DataType type) {
  return type == DataType::kFLOAT  ? ElementType::float32
         : type == DataType::kHALF ? ElementType::float16
                                   : ElementType::bfloat16;
}

int32_t kernel_size(int64_t size) {
  return size >= 0 && size <= std::numeric_limits<int32_t>::max() ? static_cast<int32_t>(size) : -1;
}

}  // namespace edgeprune
