// Prefill and decode over a bundle's graphs: the chain of segments with the sites between them.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend.h"
#include "bundle/bundle.h"
#include "decoder/eviction.h"
#include "decoder/host_pruner.h"
#include "decoder/kv_cache.h"
#include "decoder/sequence_layout.h"
#include "decoder/stopwatch.h"
#include "pictures/preprocessing.h"
#include "text/guide.h"

namespace edgeprune {

// What one pruning site did with one prompt.
struct SiteReport {
  std::string name;
  std::string place;
  int64_t tokens_in = 0;
  int64_t kept = 0;
  std::vector<int64_t> indices;  // slots of the kept tokens, ascending
  std::vector<EvictionEvent> evictions;
};

// Pictures behind the vision tower.
struct TowerOutput {
  VisualLayout layout;
  TensorMap outputs;
  FeatureRows rows;
};

// A sequence between prefill and its last token.
struct Sequence {
  struct Drop {
    int64_t tokens_in, kept;
    Tensor visual_slots;
  };
  struct CacheEviction {
    Eviction state;
    Tensor visual_slots;  // of the rows that entered the site
    int64_t first_position;
  };

  std::vector<SegmentCache> caches;  // one per segment
  int64_t position = 0;              // of the next token
  std::vector<Drop> drops;
  std::optional<CacheEviction> eviction;
};

class GraphChain {
 public:
  // Opens every graph. The bundle and the backend outlive the chain. The pruner chooses at the sites that let the host
  // choose; without one they do. Throws BackendError.
  GraphChain(const Bundle& bundle, Backend& backend, Pruner pruner);

  // Runs the vision tower: says how many visual tokens each picture brings into the prompt.
  TowerOutput encode_pictures(const PreparedPictures& pictures, Stopwatch& watch) const;
  // Runs a prompt; `tower` and `guide` may be null. Returns the logits of its last row, in host memory.
  Tensor prefill(const std::vector<int64_t>& token_ids, const TowerOutput* tower, const GuideInputs* guide,
                 int64_t max_new_tokens, Sequence& sequence, Stopwatch& watch) const;
  // Runs one generated token; returns the logits.
  Tensor decode(int64_t token_id, Sequence& sequence, Stopwatch& watch) const;

  std::vector<SiteReport> site_reports(const Sequence& sequence) const;

 private:
  const Graph& graph(const std::string& name) const { return *graphs_.at(name); }
  std::vector<int64_t> integers(const Tensor& tensor) const;
  Tensor position_tensor(int64_t position) const;
  TensorMap visual_tokens(const TowerOutput* tower, Stopwatch& watch) const;
  TensorMap embedded(const std::vector<int64_t>& token_ids, const TensorMap& visual) const;
  TensorMap probe(const SequenceLayout& layout, const std::vector<int64_t>& positions, const TensorMap& visual,
                  const TensorMap& state, const GuideInputs* guide) const;
  TensorMap run_segment(size_t index, const TensorMap& state, SegmentCache& cache, int64_t num_new) const;
  SequenceLayout drop(size_t index, const SequenceLayout& layout, TensorMap& state, const TensorMap& outputs,
                      Sequence& sequence, Stopwatch& watch) const;
  std::optional<std::vector<int64_t>> pruner_choice(const SiteEntry& site, const SequenceLayout& layout, const TensorMap& chosen,
                                                    const Tensor& visual_slots, int64_t num_rows, Stopwatch& watch) const;
  void evict(const TensorMap& outputs, Sequence& sequence, Stopwatch& watch) const;
  Tensor logits(const TensorMap& outputs, Stopwatch& watch) const;

  const Manifest& manifest_;
  Backend& backend_;
  Pruner pruner_;
  std::map<std::string, std::unique_ptr<Graph>> graphs_;
  DataType type_;
  int64_t image_token_id_;
  std::vector<Numbering> numberings_;
  TensorMap no_visual_;  // text alone has no visual tokens; the embedding graph reads one row that no placeholder asks for
  TensorMap no_probe_;
};

}  // namespace edgeprune
