#include "token_gather_plugin.h"

#include <algorithm>
#include <new>

namespace edgeprune {
namespace {

using nvinfer1::DataType;

// 0 for a type that TensorRT lets no plugin put out, as booleans.
int64_t bytes_of(DataType type) {
  switch (type) {
    case DataType::kINT64: return 8;
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    case DataType::kINT8: return 1;
    default: return 0;
  }
}

int64_t product(const nvinfer1::Dims& dims, int64_t from, int64_t until) {
  int64_t size = 1;
  for (int64_t i = from; i < until; ++i) size *= dims.d[i];
  return size;
}

}  // namespace

TokenGatherPlugin::TokenGatherPlugin(const nvinfer1::PluginFieldCollection* fields)
    : OperatorPlugin(kName, Attributes(fields, kAttributes)), axes_(attributes().integers("axes")) {
  const auto is_axis = [](int64_t axis) { return axis >= 0 && axis < nvinfer1::Dims::MAX_DIMS; };
  if (axes_.size() > kMaxGathered || !std::all_of(axes_.begin(), axes_.end(), is_axis)) {
    throw AttributeError("the attribute 'axes' must be one axis for each of 1 to 8 tensors");
  }
}

nvinfer1::IPluginV3* TokenGatherPlugin::clone() noexcept { return new (std::nothrow) TokenGatherPlugin(*this); }

bool TokenGatherPlugin::has_type(int32_t position, const DataType* types) const {
  if (position == 0) return types[0] == DataType::kINT64;
  const int32_t outputs = getNbOutputs();
  return position <= outputs ? bytes_of(types[position]) > 0 : types[position] == types[position - outputs];
}

DataType TokenGatherPlugin::output_type(int32_t output, const DataType* input_types) const {
  return input_types[output + 1];
}

bool TokenGatherPlugin::has_rank(int32_t input, int32_t rank) const {
  return input == 0 ? rank == 1 : rank > axes_[static_cast<size_t>(input) - 1];
}

void TokenGatherPlugin::output_shapes(const nvinfer1::DimsExprs* inputs, nvinfer1::DimsExprs* outputs,
                                      nvinfer1::IExprBuilder&) const {
  for (size_t i = 0; i < axes_.size(); ++i) {
    outputs[i] = inputs[i + 1];
    outputs[i].d[axes_[i]] = inputs[0].d[0];
  }
}

cudaError_t TokenGatherPlugin::run(const nvinfer1::PluginTensorDesc* inputs, const nvinfer1::PluginTensorDesc*,
                                   const void* const* input_data, void* const* output_data, void*,
                                   cudaStream_t stream) const {
  const int64_t kept = inputs[0].dims.d[0];
  GatheredTensor tensors[kMaxGathered] = {};
  for (size_t i = 0; i < axes_.size(); ++i) {
    const nvinfer1::Dims& dims = inputs[i + 1].dims;
    GatheredTensor& tensor = tensors[i];
    tensor.source = input_data[i + 1];
    tensor.target = output_data[i];
    tensor.outer = product(dims, 0, axes_[i]);
    tensor.rows = dims.d[axes_[i]];
    tensor.row_bytes = product(dims, axes_[i] + 1, dims.nbDims) * bytes_of(inputs[i + 1].type);
    tensor.source_stride = tensor.rows * tensor.row_bytes;
    tensor.target_stride = kept * tensor.row_bytes;
  }
  return edgeprune_token_gather(tensors, getNbOutputs(), static_cast<const int64_t*>(input_data[0]), kept, stream);
}

}  // namespace edgeprune
