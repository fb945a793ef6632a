// Where the visual tokens of a sequence lie: the index tensors that the host gives to the site graphs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "bundle/manifest.h"
#include "tensor.h"
#include "visual_layout.h"

namespace edgeprune {

// Rows of one sequence at some depth of the decoder. Text is never dropped, so the rows after the last visual token stay
// the last rows at every depth.
class SequenceLayout {
 public:
  // Of a prompt's ids, placeholders included; `visual` is null for a prompt without pictures and outlives the layout.
  // Throws PromptError: there are visual tokens but no text after the last one.
  SequenceLayout(const std::vector<int64_t>& token_ids, int64_t image_token_id, const VisualLayout* visual);

  int64_t num_rows() const { return num_rows_; }
  int64_t num_text_rows() const { return num_text_rows_; }
  int64_t num_visual() const { return num_visual_; }
  // Null for a prompt without pictures.
  const VisualLayout* visual() const { return visual_; }
  int64_t num_images() const { return visual_ == nullptr ? 0 : visual_->num_images(); }

  // The layout after a site that left so many rows.
  SequenceLayout keep(int64_t num_rows) const;
  // Visual tokens that leave a site, merged ones included; none if it depends on what the pictures show.
  std::optional<int64_t> visual_tokens_behind(const SiteEntry& site) const;
  // An index tensor by name. Throws BackendError: the host does not give a tensor of that name.
  Tensor host_input(const std::string& name, const SiteEntry& site) const;
  std::vector<int64_t> text_rows() const;

 private:
  std::optional<std::vector<int64_t>> budgets(const SiteEntry& site) const;

  int64_t num_rows_ = 0;
  int64_t num_text_rows_ = 0;
  int64_t num_visual_ = 0;
  int64_t num_prompt_rows_ = 0;
  const VisualLayout* visual_;
};

}  // namespace edgeprune
