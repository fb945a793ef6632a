#include "decoder/sequence_layout.h"

#include <algorithm>
#include <numeric>

#include "decoder/tensor_names.h"
#include "error.h"
#include "numbers.h"

namespace edgeprune {

SequenceLayout::SequenceLayout(const std::vector<int64_t>& token_ids, int64_t image_token_id, const VisualLayout* visual)
    : num_rows_(static_cast<int64_t>(token_ids.size())), num_prompt_rows_(num_rows_), visual_(visual) {
  num_visual_ = std::count(token_ids.begin(), token_ids.end(), image_token_id);
  num_text_rows_ = std::find(token_ids.rbegin(), token_ids.rend(), image_token_id) - token_ids.rbegin();
  if (num_visual_ > 0 && num_text_rows_ == 0) {
    throw PromptError("the prompt ends with a picture: put the question after the last picture");
  }
}

SequenceLayout SequenceLayout::keep(int64_t num_rows) const {
  SequenceLayout after = *this;
  after.num_rows_ = num_rows;
  after.num_visual_ = num_visual_ - (num_rows_ - num_rows);
  return after;
}

std::optional<int64_t> SequenceLayout::visual_tokens_behind(const SiteEntry& site) const {
  if (visual_ == nullptr) return 0;
  const auto counts = budgets(site);
  if (!counts) return std::nullopt;
  return std::min(std::accumulate(counts->begin(), counts->end(), int64_t{0}), num_visual_);
}

std::vector<int64_t> SequenceLayout::text_rows() const { return counted(num_text_rows_, num_rows_ - num_text_rows_); }

Tensor SequenceLayout::host_input(const std::string& name, const SiteEntry& site) const {
  if (name == names::kTextRows) return int64_tensor(text_rows());
  if (name == names::kContextRows) return int64_tensor(counted(num_rows_ - num_text_rows_));
  if (name == names::kPromptTextRows) return int64_tensor(counted(num_text_rows_, num_prompt_rows_ - num_text_rows_));
  if (name == names::kRecycledIds) return int64_tensor(counted(site.recycled_per_image * num_images()));
  if (name == names::kMergedIds) return int64_tensor(counted(site.merged_per_image * num_images()));
  if (visual_ != nullptr && name == names::kGridIds) return int64_tensor(counted(static_cast<int64_t>(visual_->grids().size())));
  if (visual_ != nullptr && name == names::kVisualPlaces) {
    return int64_tensor(visual_->table(), {static_cast<int64_t>(visual_->places().size()), 5});
  }
  if (visual_ != nullptr && name == names::kGridKeep) {
    if (const auto counts = budgets(site)) return int64_tensor(visual_->split_over_grids(*counts));
  }
  if (name == names::kNumKeep) {
    if (const auto left = visual_tokens_behind(site)) return int64_tensor({*left - site.merged_per_image * num_images()}, {});
  }
  throw BackendError("the graph '" + site.graph + "' takes '" + name +
                     "', which this library does not know: use the edgeprune that wrote the bundle");
}

std::optional<std::vector<int64_t>> SequenceLayout::budgets(const SiteEntry& site) const {
  std::vector<int64_t> counts = visual_->tokens_per_image();
  if (!site.keep_per_image && !site.keep_share) return std::nullopt;
  for (int64_t& count : counts) {
    if (site.keep_per_image) {
      count = std::min(*site.keep_per_image, count);
    } else {
      // The product is rounded first: 0.29 · 100 is 28.999999999999996.
      count = std::max<int64_t>(1, static_cast<int64_t>(rounded_to(static_cast<double>(count) * *site.keep_share, 6)));
    }
  }
  return counts;
}

}  // namespace edgeprune
