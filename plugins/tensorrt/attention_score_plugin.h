// AttentionScore for TensorRT; what it computes is in kernels/attention_score.h.
#pragma once

#include "attention_score.h"
#include "operator_plugin.h"

namespace edgeprune {

// Inputs: query [B, H, R, D] and key [B, Hkv, S, D], float32, float16 or bfloat16; row_index [R] int64; row_weight
// [G, R] or [B, G, R] float32. Output: score [B, G, S] float32.
class AttentionScorePlugin final : public OperatorPlugin {
 public:
  static constexpr const char* kName = "AttentionScore";
  static constexpr AttributeNames kAttributes = {"scale", "mode", "causal"};

  explicit AttentionScorePlugin(const nvinfer1::PluginFieldCollection* fields);

  nvinfer1::IPluginV3* clone() noexcept override;
  int32_t getNbOutputs() const noexcept override { return 1; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc* outputs,
                          int32_t num_outputs) const noexcept override;

 protected:
  friend class ScoreSelectPlugin;  // runs it as a part

  int32_t num_inputs() const override { return 4; }
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
  AttentionScoreProblem problem(nvinfer1::DataType type, const nvinfer1::Dims& query, const nvinfer1::Dims& key,
                                const nvinfer1::Dims& row_weight) const;

  AttentionMode mode_;
  bool causal_;
  float scale_;
};

}  // namespace edgeprune
