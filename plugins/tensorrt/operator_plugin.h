// What the plugins of all operators share: capabilities, attributes, dense tensors, errors.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "attributes.h"
#include "kernel_types.h"

namespace edgeprune {

// One node of domain "edgeprune". Clones and engines have nothing but its attributes: no memory of its own, no state
// between runs, so that contexts may run it side by side and a CUDA graph may capture it.
//
// A TensorRT that calls it with tensors that an operator does not have gets an error code and a line in its log.
class OperatorPlugin : public nvinfer1::IPluginV3,
                       public nvinfer1::IPluginV3OneCore,
                       public nvinfer1::IPluginV3OneBuild,
                       public nvinfer1::IPluginV3OneRuntime {
 public:
  OperatorPlugin(const char* name, Attributes attributes)
      : name_(name), attributes_(std::move(attributes)), description_(attributes_.description()) {}

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept final;

  const char* getPluginName() const noexcept final { return name_; }
  const char* getPluginVersion() const noexcept final;
  const char* getPluginNamespace() const noexcept final;

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept final;
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t outputs,
                             const nvinfer1::DataType* input_types, int32_t inputs) const noexcept final;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept final;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept final;
  const char* getMetadataString() noexcept final { return description_.c_str(); }

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                        const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept final;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) noexcept final;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept final { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept final;

 protected:
  const Attributes& attributes() const { return attributes_; }

  virtual int32_t num_inputs() const = 0;

  // Whether a tensor, inputs first and then outputs, may have its type, given the types before it.
  virtual bool has_type(int32_t position, const nvinfer1::DataType* types) const = 0;

  // The type of an output; the inputs have types that are allowed.
  virtual nvinfer1::DataType output_type(int32_t output, const nvinfer1::DataType* input_types) const = 0;

  // The ranks of an input that the operator takes.
  virtual bool has_rank(int32_t input, int32_t rank) const = 0;

  virtual void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                             nvinfer1::IExprBuilder& builder) const = 0;

  // What the kernels do not take of a profile's greatest sizes; empty where they take all.
  virtual std::string beyond_limits(const nvinfer1::DynamicPluginTensorDesc*) const { return {}; }

  // Calls the kernels' library, whose functions launch and check each launch.
  virtual cudaError_t run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                          const void* const* input_data, void* const* output_data, void* workspace,
                          cudaStream_t stream) const = 0;

 private:
  int32_t fail(const std::string& message) const noexcept;

  const char* name_;
  Attributes attributes_;
  std::string description_;
};

// Whether the kernels read it as an ElementType.
bool is_element_type(nvinfer1::DataType type);
ElementType element_type(nvinfer1::DataType type);

// A size as the kernels take it; -1, which they refuse, for one that is too large.
int32_t kernel_size(int64_t size);

}  // namespace edgeprune
