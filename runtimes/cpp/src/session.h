// A session: an opened bundle that answers questions about pictures.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend.h"
#include "bundle/bundle.h"
#include "decoder/graph_chain.h"
#include "decoder/host_pruner.h"
#include "decoder/sampling.h"
#include "pictures/preprocessing.h"
#include "text/guide.h"
#include "text/prompt.h"

namespace edgeprune {

struct Answer {
  std::string text;                // without stop text and special tokens
  std::vector<int64_t> token_ids;  // generated, without the end token
  std::string finish_reason;       // "end", "stop", "length" or "cancelled"
  int64_t prompt_tokens = 0;
  std::vector<SiteReport> sites;
  std::vector<std::pair<std::string, double>> timings_ms;
  int64_t decode_steps = 0;

  double timing(const std::string& name) const;
  double decode_tokens_per_second() const;
  // What edgeprune run --json prints.
  std::string to_json() const;
};

// Takes a piece of the answer; false ends the generation.
using PieceCallback = std::function<bool(std::string_view piece)>;

// Graphs are opened once and shared; every answer has caches of its own, so threads may share a session.
class Session {
 public:
  // Throws BundleError, BackendError; PruningError: there is a pruner, and no site that takes one.
  Session(const std::filesystem::path& bundle, const BackendOptions& options, Pruner pruner = nullptr);
  // The chain refers to the bundle and the backend.
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // The pictures are in the order of the prompt's placeholders. Throws PictureError, PromptError, BackendError,
  // PruningError, and what the callback and the pruner throw.
  Answer answer(const std::vector<Picture>& pictures, const std::string& prompt, const SamplingOptions& options,
                const PieceCallback& callback) const;

  const Bundle& bundle() const { return bundle_; }
  const PromptEncoder& prompts() const { return prompts_; }
  const PicturePreprocessing& preprocessing() const { return *preprocessing_; }

 private:
  Bundle bundle_;
  std::unique_ptr<PicturePreprocessing> preprocessing_;
  std::unique_ptr<Backend> backend_;
  PromptEncoder prompts_;
  std::unique_ptr<GuideEncoder> guide_;
  std::unique_ptr<GraphChain> chain_;
};

}  // namespace edgeprune
