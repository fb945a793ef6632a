// The instruction as CLIP's text tower reads it, aligned with the decoder's tokens (IVTP, Eq. 7).
#pragma once

#include "bundle/bundle.h"
#include "tensor.h"
#include "text/prompt.h"

namespace edgeprune {

struct GuideInputs {
  Tensor input_ids;  // [Q, 77] int64
  Tensor token_map;  // [T, Q·77] float32, rows normalised
};

class GuideEncoder {
 public:
  // Throws BundleError: the file is no CLIP tokenizer.
  GuideEncoder(const Bundle& bundle, const FileEntry& file, int64_t context_length);

  // Texts longer than CLIP's context are cut into chunks that the tower reads one by one.
  GuideInputs encode(const EncodedPrompt& prompt) const;

 private:
  Tokenizer tokenizer_;
  int64_t context_length_;
  int64_t start_ = 0, end_ = 0;
};

}  // namespace edgeprune
