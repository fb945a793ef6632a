// TokenSelect for TensorRT; what it computes is in kernels/token_select.h.
#pragma once

#include "operator_plugin.h"
#include "token_select.h"

namespace edgeprune {

// Inputs, by mode; droppable is boolean, num_keep a scalar and like places int64, the others float32:
//   threshold: scores [P, S], thresholds [P, S], droppable [S]
//   topk:      scores [1, S], num_keep [], droppable [S]
//   soft_nms:  scores [1, S], num_keep [], droppable [S], features [S, F], places [S, 2], nearness [W];
//              features may be float16 or bfloat16
//   dpp:       kernel [S, S], num_keep [], droppable [S], groups [S] int64, group_keep [S] int64
// Outputs: keep_indices [S] and keep_count [], int64.
class TokenSelectPlugin final : public OperatorPlugin {
 public:
  static constexpr const char* kName = "TokenSelect";
  static constexpr AttributeNames kAttributes = {"mode", "similarity_sigma"};

  explicit TokenSelectPlugin(const nvinfer1::PluginFieldCollection* fields);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return 2; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;

 protected:
  friend class ScoreSelectPlugin;  // runs it as a part

  int32_t num_inputs() const override;
  bool has_type(int32_t position, const nvinfer1::DataType* types) const override;
  nvinfer1::DataType output_type(int32_t output, const nvinfer1::DataType* input_types) const override;
  bool has_rank(int32_t input, int32_t rank) const override;
  void output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const override;
  std::string beyond_limits(const nvinfer1::DynamicPluginTensorDesc* inputs) const override;
  cudaError_t run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                  const void* const* input_data, void* const* output_data, void* workspace,
                  cudaStream_t stream) const override;

 private:
  enum class Mode { threshold, topk, soft_nms, dpp };

  static Mode mode_of(const std::string& name);
  SoftNmsProblem soft_nms(nvinfer1::DataType type, const nvinfer1::Dims& features,
                          const nvinfer1::Dims& nearness) const;

  Mode mode_;
  float similarity_sigma_;
};

}  // namespace edgeprune
