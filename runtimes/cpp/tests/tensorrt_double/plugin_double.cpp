// The plugin library's double: its names and what it says of itself, without kernels.
#include <NvInferRuntime.h>

#include "gpu_double.h"

namespace {

class CreatorDouble final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit CreatorDouble(const char* name) : name_(name) {}
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection*, nvinfer1::TensorRTPhase) noexcept override {
    return nullptr;
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return name_; }
  const char* getPluginVersion() const noexcept override { return "1"; }
  const char* getPluginNamespace() const noexcept override { return "edgeprune"; }

 private:
  const char* name_;
  nvinfer1::PluginFieldCollection fields_{};
};

}  // namespace

extern "C" {

EDGEPRUNE_DOUBLE nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static CreatorDouble attention_score("AttentionScore"), token_select("TokenSelect"), token_gather("TokenGather"),
      score_select("ScoreSelect");
  static nvinfer1::IPluginCreatorInterface* const all[] = {&attention_score, &token_select, &token_gather, &score_select};
  count = 4;
  return all;
}

#define EDGEPRUNE_TEXT_OF(value) #value
#define EDGEPRUNE_TEXT(value) EDGEPRUNE_TEXT_OF(value)
EDGEPRUNE_DOUBLE const char* edgeprune_plugin_built_for() {
  return "edgeprune plugin 1; TensorRT " EDGEPRUNE_TEXT(NV_TENSORRT_MAJOR) "." EDGEPRUNE_TEXT(NV_TENSORRT_MINOR) "; CUDA 12060; SM 89";
}

}  // extern "C"
