// AttentionScore and the TokenSelect of its scores as one plugin: the scores stay in the workspace.
#pragma once

#include "attention_score_plugin.h"
#include "token_select_plugin.h"

namespace edgeprune {

// Inputs: those of AttentionScore, of one sequence, then those of TokenSelect in mode topk or soft_nms behind its scores.
// Outputs: those of TokenSelect. No bundle has this node: edgeprune makes it of the two while it builds.
class ScoreSelectPlugin final : public OperatorPlugin {
 public:
  static constexpr const char* kName = "ScoreSelect";
  static constexpr AttributeNames kAttributes = {"scale", "score_mode", "causal", "mode", "similarity_sigma"};

  explicit ScoreSelectPlugin(const nvinfer1::PluginFieldCollection* fields);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return select_.getNbOutputs(); }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;

 protected:
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
  AttentionScorePlugin score_;
  TokenSelectPlugin select_;
};

}  // namespace edgeprune
