#include "attention_score_plugin.h"

#include <new>

namespace edgeprune {
namespace {

using nvinfer1::DataType;

enum Input { kQuery, kKey, kRowIndex, kRowWeight, kScore };

AttentionMode mode_of(const std::string& name) {
  if (name == "probabilities") return AttentionMode::probabilities;
  if (name == "logits") return AttentionMode::logits;
  throw AttributeError("there is no kernel for mode '" + name + "'");
}

}  // namespace

AttentionScorePlugin::AttentionScorePlugin(const nvinfer1::PluginFieldCollection* fields)
    : OperatorPlugin(kName, Attributes(fields, kAttributes)),
      mode_(mode_of(attributes().text("mode"))),
      causal_(attributes().integer("causal") != 0),
      scale_(attributes().number("scale")) {}

nvinfer1::IPluginV3* AttentionScorePlugin::clone() noexcept { return new (std::nothrow) AttentionScorePlugin(*this); }

bool AttentionScorePlugin::has_type(int32_t position, const DataType* types) const {
  switch (position) {
    case kQuery: return is_element_type(types[kQuery]);
    case kKey: return types[kKey] == types[kQuery];
    case kRowIndex: return types[kRowIndex] == DataType::kINT64;
    default: return types[position] == DataType::kFLOAT;
  }
}

DataType AttentionScorePlugin::output_type(int32_t, const DataType*) const { return DataType::kFLOAT; }

bool AttentionScorePlugin::has_rank(int32_t input, int32_t rank) const {
  switch (input) {
    case kRowIndex: return rank == 1;
    case kRowWeight: return rank == 2 || rank == 3;
    default: return rank == 4;
  }
}

void AttentionScorePlugin::output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                         nvinfer1::IExprBuilder&) const {
  const nvinfer1::DimsExprs& weight = inputs[kRowWeight];
  outputs[0].nbDims = 3;
  outputs[0].d[0] = inputs[kKey].d[0];
  outputs[0].d[1] = weight.d[weight.nbDims - 2];
  outputs[0].d[2] = inputs[kKey].d[2];
}

std::string AttentionScorePlugin::beyond_limits(const nvinfer1::DynamicPluginTensorDesc* inputs) const {
  const int64_t width = inputs[kQuery].max.d[3];
  if (width <= kMaxHeadDim) return {};
  return "heads are " + std::to_string(width) + " wide, its kernels take " + std::to_string(kMaxHeadDim) +
         ": build without the plugin";
}

size_t AttentionScorePlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                              const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  // Engines run at any size up to the profile's greatest, and fewer rows may need more.
  const AttentionScoreProblem greatest =
      problem(inputs[kQuery].desc.type, inputs[kQuery].max, inputs[kKey].max, inputs[kRowWeight].max);
  return edgeprune_attention_score_workspace_bound(&greatest);
}

cudaError_t AttentionScorePlugin::run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                                      const void* const* input_data, void* const* output_data, void* workspace,
                                      cudaStream_t stream) const {
  const AttentionScoreProblem now =
      problem(inputs[kQuery].type, inputs[kQuery].dims, inputs[kKey].dims, inputs[kRowWeight].dims);
  if (inputs[kRowIndex].dims.d[0] != now.rows || inputs[kKey].dims.d[0] != now.batch ||
      inputs[kKey].dims.d[3] != now.head_dim || now.query_length != now.rows ||
      (now.weights_per_batch && inputs[kRowWeight].dims.d[0] != now.batch)) {
    return cudaErrorInvalidValue;
  }
  return edgeprune_attention_score(&now, input_data[kQuery], input_data[kKey], nullptr,
                                   static_cast<const int64_t*>(input_data[kRowIndex]),
                                   static_cast<const float*>(input_data[kRowWeight]),
                                   static_cast<float*>(output_data[0]), workspace, stream);
}

AttentionScoreProblem AttentionScorePlugin::problem(DataType type, const nvinfer1::Dims& query,
                                                    const nvinfer1::Dims& key,
                                                    const nvinfer1::Dims& row_weight) const {
  AttentionScoreProblem p = {};
  p.element_type = element_type(type);
  p.mode = mode_;
  p.causal = causal_;
  p.weights_per_batch = row_weight.nbDims == 3;
  p.batch = kernel_size(query.d[0]);
  p.heads = kernel_size(query.d[1]);
  p.key_heads = kernel_size(key.d[1]);
  p.query_length = kernel_size(query.d[2]);
  p.rows = kernel_size(row_weight.d[row_weight.nbDims - 1]);
  p.keys = kernel_size(key.d[2]);
  p.head_dim = kernel_size(query.d[3]);
  p.groups = kernel_size(row_weight.d[row_weight.nbDims - 2]);
  p.scale = scale_;
  return p;
}

}  // namespace edgeprune
