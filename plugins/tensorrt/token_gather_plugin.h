// TokenGather for TensorRT; what it computes is in kernels/token_gather.h.
#pragma once

#include <vector>

#include "operator_plugin.h"
#include "token_gather.h"

namespace edgeprune {

// Inputs: keep_indices [K] int64, then 1 to 8 tensors of numbers. Outputs: the tensors with K rows along their axes.
class TokenGatherPlugin final : public OperatorPlugin {
 public:
  static constexpr const char* kName = "TokenGather";
  static constexpr AttributeNames kAttributes = {"axes"};

  explicit TokenGatherPlugin(const nvinfer1::PluginFieldCollection* fields);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(axes_.size()); }

 protected:
  int32_t num_inputs() const override { return 1 + getNbOutputs(); }
  bool has_type(int32_t position, const nvinfer1::DataType* types) const override;
  nvinfer1::DataType output_type(int32_t output, const nvinfer1::DataType* input_types) const override;
  bool has_rank(int32_t input, int32_t rank) const override;
  void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const override;
  cudaError_t run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) const override;

 private:
  std::vector<int64_t> axes_;
};

}  // namespace edgeprune
