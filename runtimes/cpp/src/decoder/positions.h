// Position ids of a prompt before anything is pruned, and of generated tokens behind sites that number rows anew.
#pragma once

#include <cstdint>
#include <vector>

#include "bundle/manifest.h"
#include "visual_layout.h"

namespace edgeprune {

// Position ids of a prompt, [axes, rows] row by row. With three axes Qwen2-VL's M-RoPE: time, row and column; text has
// the same on all three, a visual token stands at the picture's start plus its row and column, and behind a picture
// counting goes on from the largest. Throws PromptError: rows and layout disagree about the number of visual tokens.
std::vector<int64_t> prompt_positions(int64_t axes, const std::vector<int64_t>& token_ids, int64_t image_token_id,
                                      const VisualLayout* visual);

// The numbering of every segment, from that of the sites between them: a site that leaves positions as they are leaves
// them as an earlier site made them.
std::vector<Numbering> segment_numberings(const std::vector<SiteEntry>& sites);

}  // namespace edgeprune
