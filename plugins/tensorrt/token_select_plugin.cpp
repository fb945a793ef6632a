#include "token_select_plugin.h"

#include <new>

namespace edgeprune {
namespace {

using nvinfer1::DataType;

enum Input { kScores, kSecond, kDroppable, kFeatures, kPlaces, kNearness };
enum DppInput { kKernel = 0, kGroups = 3, kGroupKeep = 4 };

}  // namespace

TokenSelectPlugin::TokenSelectPlugin(const nvinfer1::PluginFieldCollection* fields)
    : OperatorPlugin(kName, Attributes(fields, kAttributes)),
      mode_(mode_of(attributes().text("mode"))),
      similarity_sigma_(mode_ == Mode::soft_nms ? attributes().number("similarity_sigma") : 0.0f) {}

TokenSelectPlugin::Mode TokenSelectPlugin::mode_of(const std::string& name) {
  if (name == "threshold") return Mode::threshold;
  if (name == "topk") return Mode::topk;
  if (name == "soft_nms") return Mode::soft_nms;
  if (name == "dpp") return Mode::dpp;
  throw AttributeError("there is no kernel for mode '" + name + "': build this graph without the plugin");
}

nvinfer1::IPluginV3* TokenSelectPlugin::clone() noexcept { return new (std::nothrow) TokenSelectPlugin(*this); }

int32_t TokenSelectPlugin::num_inputs() const {
  switch (mode_) {
    case Mode::soft_nms: return 6;
    case Mode::dpp: return 5;
    default: return 3;
  }
}

bool TokenSelectPlugin::has_type(int32_t position, const DataType* types) const {
  if (position >= num_inputs()) return types[position] == DataType::kINT64;
  if (mode_ == Mode::dpp && position >= kGroups) return types[position] == DataType::kINT64;
  switch (position) {
    case kSecond: return types[kSecond] == (mode_ == Mode::threshold ? DataType::kFLOAT : DataType::kINT64);
    case kDroppable: return types[kDroppable] == DataType::kBOOL;
    case kFeatures: return is_element_type(types[kFeatures]);
    case kPlaces: return types[kPlaces] == DataType::kINT64;
    default: return types[position] == DataType::kFLOAT;
  }
}

DataType TokenSelectPlugin::output_type(int32_t, const DataType*) const { return DataType::kINT64; }

bool TokenSelectPlugin::has_rank(int32_t input, int32_t rank) const {
  if (mode_ == Mode::dpp && input >= kGroups) return rank == 1;
  switch (input) {
    case kSecond: return rank == (mode_ == Mode::threshold ? 2 : 0);
    case kDroppable:
    case kNearness: return rank == 1;
    default: return rank == 2;
  }
}

void TokenSelectPlugin::output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                      nvinfer1::IExprBuilder&) const {
  outputs[0].nbDims = 1;
  outputs[0].d[0] = inputs[kDroppable].d[0];
  outputs[1].nbDims = 0;
}

std::string TokenSelectPlugin::beyond_limits(const nvinfer1::DynamicPluginTensorDesc* inputs) const {
  const int64_t rows = inputs[kDroppable].max.d[0];
  if (rows <= kMaxSelectRows) return {};
  return "the profile has " + std::to_string(rows) + " rows, its kernels take " + std::to_string(kMaxSelectRows) +
         ": build shorter profiles, or without the plugin";
}

size_t TokenSelectPlugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t,
                                           const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept {
  if (mode_ == Mode::dpp) return edgeprune_select_by_dpp_workspace(1, kernel_size(inputs[kDroppable].max.d[0]));
  if (mode_ != Mode::soft_nms) return 0;
  const SoftNmsProblem greatest =
      soft_nms(inputs[kFeatures].desc.type, inputs[kFeatures].max, inputs[kNearness].max);
  return edgeprune_select_by_soft_nms_workspace(&greatest);  // it grows with the rows
}

cudaError_t TokenSelectPlugin::run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                                   const void* const* input_data, void* const* output_data, void* workspace,
                                   cudaStream_t stream) const {
  constexpr int32_t batch = 1;
  const int64_t pairs = inputs[kScores].dims.d[0], rows = inputs[kDroppable].dims.d[0];
  if (inputs[kScores].dims.d[1] != rows || pairs != (mode_ == Mode::threshold ? inputs[kSecond].dims.d[0]
                                                     : mode_ == Mode::dpp     ? rows
                                                                              : 1)) {
    return cudaErrorInvalidValue;
  }
  const auto* scores = static_cast<const float*>(input_data[kScores]);
  const auto* droppable = static_cast<const uint8_t*>(input_data[kDroppable]);
  auto* keep_indices = static_cast<int64_t*>(output_data[0]);
  auto* keep_count = static_cast<int64_t*>(output_data[1]);
  if (mode_ == Mode::threshold) {
    if (inputs[kSecond].dims.d[1] != rows) return cudaErrorInvalidValue;
    return edgeprune_select_by_threshold(batch, kernel_size(pairs), kernel_size(rows), scores,
                                         static_cast<const float*>(input_data[kSecond]), droppable, keep_indices,
                                         keep_count, stream);
  }
  const auto* num_keep = static_cast<const int64_t*>(input_data[kSecond]);
  if (mode_ == Mode::topk) {
    return edgeprune_select_top_k(batch, kernel_size(rows), scores, num_keep, droppable, keep_indices, keep_count,
                                  stream);
  }
  if (mode_ == Mode::dpp) {
    if (inputs[kGroups].dims.d[0] != rows || inputs[kGroupKeep].dims.d[0] != rows) return cudaErrorInvalidValue;
    return edgeprune_select_by_dpp(batch, kernel_size(rows), static_cast<const float*>(input_data[kKernel]), num_keep,
                                   droppable, static_cast<const int64_t*>(input_data[kGroups]),
                                   static_cast<const int64_t*>(input_data[kGroupKeep]), keep_indices, keep_count,
                                   workspace, stream);
  }
  const nvinfer1::Dims& features = inputs[kFeatures].dims;
  const nvinfer1::Dims& places = inputs[kPlaces].dims;
  if (features.d[0] != rows || places.d[0] != rows || places.d[1] != 2) return cudaErrorInvalidValue;
  const SoftNmsProblem now = soft_nms(inputs[kFeatures].type, features, inputs[kNearness].dims);
  return edgeprune_select_by_soft_nms(&now, scores, num_keep, droppable, input_data[kFeatures],
                                      static_cast<const int64_t*>(input_data[kPlaces]),
                                      static_cast<const float*>(input_data[kNearness]), keep_indices, keep_count,
                                      workspace, stream);
}

SoftNmsProblem TokenSelectPlugin::soft_nms(DataType type, const nvinfer1::Dims& features,
                                           const nvinfer1::Dims& nearness) const {
  SoftNmsProblem p = {};
  p.feature_type = element_type(type);
  p.batch = 1;
  p.rows = kernel_size(features.d[0]);
  p.features = kernel_size(features.d[1]);
  p.table_size = kernel_size(nearness.d[0]);
  p.similarity_sigma = similarity_sigma_;
  return p;
}

}  // namespace edgeprune
