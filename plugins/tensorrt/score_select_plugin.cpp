#include "score_select_plugin.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

namespace edgeprune {
namespace {

// The inputs of TokenSelect begin here; in the place of its scores stands the last input of AttentionScore.
constexpr int32_t kSelect = 3;
constexpr int32_t kKey = 1;

// The attributes of one of the two: without `hidden`, and with `from` called "mode".
template <typename Plugin>
Plugin part(const nvinfer1::PluginFieldCollection* fields, const char* from, const char* hidden) {
  std::vector<nvinfer1::PluginField> named;
  for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
    nvinfer1::PluginField field = fields->fields[i];
    if (field.name == nullptr || !std::strcmp(field.name, hidden)) continue;
    if (!std::strcmp(field.name, from)) field.name = "mode";
    named.push_back(field);
  }
  const nvinfer1::PluginFieldCollection collection = {static_cast<int32_t>(named.size()), named.data()};
  return Plugin(&collection);
}

size_t score_bytes(const nvinfer1::Dims& key) {
  const size_t bytes = sizeof(float) * static_cast<size_t>(std::max<int64_t>(key.d[2], 0));
  return (bytes + 255) / 256 * 256;
}

}  // namespace

ScoreSelectPlugin::ScoreSelectPlugin(const nvinfer1::PluginFieldCollection* fields)
    : OperatorPlugin(kName, Attributes(fields, kAttributes)),
      score_(part<AttentionScorePlugin>(fields, "score_mode", "mode")),
      select_(part<TokenSelectPlugin>(fields, "mode", "score_mode")) {
  const std::string mode = attributes().text("mode");
  if (mode != "topk" && mode != "soft_nms") throw AttributeError("mode '" + mode + "' does not choose by one score");
}

nvinfer1::IPluginV3* ScoreSelectPlugin::clone() noexcept { return new (std::nothrow) ScoreSelectPlugin(*this); }

int32_t ScoreSelectPlugin::num_inputs() const { return kSelect + select_.num_inputs(); }

bool ScoreSelectPlugin::has_type(int32_t position, const nvinfer1::DataType* types) const {
  return position <= kSelect ? score_.has_type(position, types) : select_.has_type(position - kSelect, types + kSelect);
}

nvinfer1::DataType ScoreSelectPlugin::output_type(int32_t output, const nvinfer1::DataType* input_types) const {
  return select_.output_type(output, input_types + kSelect);
}

bool ScoreSelectPlugin::has_rank(int32_t input, int32_t rank) const {
  return input <= kSelect ? score_.has_rank(input, rank) : select_.has_rank(input - kSelect, rank);
}

void ScoreSelectPlugin::output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                      nvinfer1::IExprBuilder& builder) const {
  select_.output_shapes(inputs + kSelect, outputs, builder);
}

std::string ScoreSelectPlugin::beyond_limits(const nvinfer1::DynamicPluginTensorDesc* inputs) const {
  const std::string reason = score_.beyond_limits(inputs);
  return reason.empty() ? select_.beyond_limits(inputs + kSelect) : reason;
}

size_t ScoreSelectPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                           const nvinfer1::DynamicPluginTensorDesc* outputs,
                                           int32_t num_outputs) const noexcept {
  // One after the other, so both may use the same bytes behind the scores.
  const size_t score = score_.getWorkspaceSize(inputs, kSelect + 1, nullptr, 0);
  const size_t select = select_.getWorkspaceSize(inputs + kSelect, select_.num_inputs(), outputs, num_outputs);
  return score_bytes(inputs[kKey].max) + std::max(score, select);
}

cudaError_t ScoreSelectPlugin::run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc* outputs,
                                   const void* const* input_data, void* const* output_data, void* workspace,
                                   cudaStream_t stream) const {
  const nvinfer1::Dims& weight = inputs[kSelect].dims;
  const nvinfer1::Dims& key = inputs[kKey].dims;
  if (key.d[0] != 1 || weight.d[weight.nbDims - 2] != 1) return cudaErrorInvalidValue;  // one score per row
  void* const rest = static_cast<char*>(workspace) + score_bytes(key);
  const cudaError_t error = score_.run(inputs, nullptr, input_data, &workspace, rest, stream);
  if (error != cudaSuccess) return error;

  std::vector<nvinfer1::PluginTensorDesc> tensors(inputs + kSelect, inputs + num_inputs());
  std::vector<const void*> data(input_data + kSelect, input_data + num_inputs());
  tensors[0].type = nvinfer1::DataType::kFLOAT;
  tensors[0].dims.nbDims = 2;
  tensors[0].dims.d[0] = 1;
  tensors[0].dims.d[1] = key.d[2];
  data[0] = workspace;
  return select_.run(tensors.data(), outputs, data.data(), output_data, rest, stream);
}

}  // namespace edgeprune
