// Names of the tensors that travel between graphs; the table of edgeprune/tensor_names.py.
#pragma once

#include <cstdint>
#include <string>

namespace edgeprune::names {

constexpr const char* kPatchSlots = "patch_slots";
constexpr const char* kPatchCounts = "patch_counts";
constexpr const char* kFeatureRows = "feature_rows";
constexpr const char* kImageFeatures = "image_features";
constexpr const char* kImageSlots = "image_slots";
constexpr const char* kImageDeepstackFeatures = "image_deepstack_features";
constexpr const char* kInputIds = "input_ids";
constexpr const char* kInputsEmbeds = "inputs_embeds";
constexpr const char* kHiddenStates = "hidden_states";
constexpr const char* kPositionIds = "position_ids";
constexpr const char* kDeepstackFeatures = "deepstack_features";
constexpr const char* kVisualSlots = "visual_slots";
constexpr const char* kKeepIndices = "keep_indices";
constexpr const char* kKeepCount = "keep_count";
constexpr const char* kScores = "scores";
constexpr const char* kNumKeep = "num_keep";
constexpr const char* kTextRows = "text_rows";
constexpr const char* kPromptSlots = "prompt_slots";
constexpr const char* kPromptTextRows = "prompt_text_rows";
constexpr const char* kRecycledIds = "recycled_ids";
constexpr const char* kMergedIds = "merged_ids";
constexpr const char* kVisualRanks = "visual_ranks";
constexpr const char* kRate = "rate";
constexpr const char* kCachedKey = "cached_key";
constexpr const char* kCachedValue = "cached_value";
constexpr const char* kContextRows = "context_rows";
constexpr const char* kGridIds = "grid_ids";
constexpr const char* kGridKeep = "grid_keep";
constexpr const char* kVisualPlaces = "visual_places";
constexpr const char* kLogits = "logits";
constexpr const char* kProbeWeights = "probe_weights";
constexpr const char* kProbeOffset = "probe_offset";
constexpr const char* kProbePositionIds = "probe_position_ids";
constexpr const char* kClassFeatures = "class_features";
constexpr const char* kImageEmbeds = "image_embeds";
constexpr const char* kGuideInputIds = "guide_input_ids";
constexpr const char* kGuideTokenMap = "guide_token_map";
constexpr const char* kPast = "past_key_values";
constexpr const char* kPresent = "present";

inline std::string out(const std::string& name) { return "out." + name; }
inline std::string extended(const std::string& name) { return "extended." + name; }
// Such as "past_key_values.0.key".
inline std::string cached(const std::string& kind, int64_t layer, const std::string& part) {
  return kind + "." + std::to_string(layer) + "." + part;
}

}  // namespace edgeprune::names
