// The library's entry points: the creators for TensorRT's IPluginRegistry::loadLibrary, and what edgeprune reads before.
//
// Nothing of TensorRT is linked. What the plugins need of it comes with the objects that it hands over, so the library
// loads beside TensorRT and TensorRT for RTX alike; only the major version of the headers must be theirs.
#include <NvInferRuntime.h>

#include <vector>

#include "attention_score_plugin.h"
#include "plugin_log.h"
#include "plugin_version.h"
#include "score_select_plugin.h"
#include "token_gather_plugin.h"
#include "token_select_plugin.h"

namespace edgeprune {
namespace {

template <typename Plugin>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  Creator() {
    for (const char* name : Plugin::kAttributes) names_.emplace_back(name);
    collection_.nbFields = static_cast<int32_t>(names_.size());
    collection_.fields = names_.data();
  }

  nvinfer1::IPluginV3* createPlugin(const char* node, const nvinfer1::PluginFieldCollection* fields,
                                    nvinfer1::TensorRTPhase) noexcept override {
    try {
      return new Plugin(fields);
    } catch (const std::exception& error) {
      report_error(Plugin::kName, std::string("node '") + (node == nullptr ? "" : node) + "': " + error.what());
      return nullptr;
    }
  }

  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return EDGEPRUNE_PLUGIN_VERSION; }
  const char* getPluginNamespace() const noexcept override { return EDGEPRUNE_PLUGIN_NAMESPACE; }

 private:
  std::vector<nvinfer1::PluginField> names_;
  nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace
}  // namespace edgeprune

EDGEPRUNE_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using namespace edgeprune;
  static Creator<AttentionScorePlugin> attention_score;
  static Creator<TokenSelectPlugin> token_select;
  static Creator<TokenGatherPlugin> token_gather;
  static Creator<ScoreSelectPlugin> score_select;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&attention_score, &token_select, &token_gather,
                                                                &score_select};
  count = 4;
  return creators;
}

EDGEPRUNE_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { edgeprune::set_logger_finder(finder); }

#define EDGEPRUNE_TEXT_OF(value) #value
#define EDGEPRUNE_TEXT(value) EDGEPRUNE_TEXT_OF(value)

// What the library is: its version, the headers and the CUDA runtime that it was compiled with, the compute capabilities
// of its kernels. edgeprune reads the text in the file, so that a library that does not fit is never loaded.
EDGEPRUNE_API const char* edgeprune_plugin_built_for() {
  return "edgeprune plugin " EDGEPRUNE_TEXT(EDGEPRUNE_PLUGIN_LIBRARY_VERSION) "; TensorRT "  //
      EDGEPRUNE_TEXT(NV_TENSORRT_MAJOR) "." EDGEPRUNE_TEXT(NV_TENSORRT_MINOR) "; CUDA "      //
      EDGEPRUNE_TEXT(CUDART_VERSION) "; SM " EDGEPRUNE_PLUGIN_ARCHITECTURES;
}
