#include "decoder/graph_chain.h"

#include <algorithm>
#include <stdexcept>

#include "decoder/positions.h"
#include "decoder/tensor_names.h"
#include "error.h"
#include "numbers.h"

namespace edgeprune {
namespace {

const Tensor& among(const TensorMap& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw BackendError("no graph gives '" + name + "': export the bundle again");
  return found->second;
}

const Tensor* find(const TensorMap& tensors, const std::string& name) {
  const auto found = tensors.find(name);
  return found == tensors.end() ? nullptr : &found->second;
}

// Later maps come first: what they hold wins.
void add_missing(TensorMap& tensors, const TensorMap& others) { tensors.insert(others.begin(), others.end()); }

void replace(TensorMap& tensors, const TensorMap& newer) {
  for (const auto& [name, tensor] : newer) tensors[name] = tensor;
}

Tensor as_type(const Tensor& tensor, DataType type) {
  if (tensor.type == type) return tensor;
  if (tensor.type != DataType::float32 || type != DataType::float16) {
    throw BackendError("the vision graph takes another type than its pictures have: export the bundle again");
  }
  Tensor halves = host_tensor(tensor.shape, type);
  const auto count = static_cast<size_t>(element_count(tensor.shape));
  std::transform(tensor.data<float>(), tensor.data<float>() + count, halves.data<uint16_t>(), half_from_float);
  return halves;
}

// Host inputs that are the same at every depth of the decoder: a prompt uploads them once.
bool is_of_prompt(const std::string& name) {
  return name == names::kGridIds || name == names::kPromptTextRows || name == names::kVisualPlaces;
}

TensorMap selected(const std::vector<TensorEntry>& entries, const TensorMap& available) {
  TensorMap inputs;
  for (const TensorEntry& entry : entries) inputs[entry.name] = among(available, entry.name);
  return inputs;
}

}  // namespace

GraphChain::GraphChain(const Bundle& bundle, Backend& backend, Pruner pruner)
    : manifest_(bundle.manifest()),
      backend_(backend),
      pruner_(std::move(pruner)),
      type_(data_type(bundle.manifest().dtype)),
      image_token_id_(bundle.manifest().prompt.at("image_token_id").get<int64_t>()),
      numberings_(segment_numberings(bundle.manifest().sites)) {
  graphs_ = open_graphs(bundle, backend);
  const int64_t width = manifest_.geometry.hidden_size;
  no_visual_ = {{names::kImageFeatures, backend.upload(zero_tensor({1, width}, type_))},
                {names::kImageSlots, backend.upload(int64_tensor({0}))}};
  if (const int64_t added = manifest_.deepstack_layers()) {
    no_visual_[names::kImageDeepstackFeatures] = backend.upload(zero_tensor({added, 1, width}, type_));
  }
  no_probe_ = {{names::kProbeOffset, backend.upload(host_tensor({0, width}, type_))},
               {names::kProbePositionIds,
                backend.upload(host_tensor({manifest_.geometry.position_axes, 0}, DataType::int64))}};
}

std::vector<int64_t> GraphChain::integers(const Tensor& tensor) const {
  const Tensor host = backend_.download(tensor);
  if (host.type != DataType::int64) throw BackendError("a graph gives numbers that are no integers: export the bundle again");
  return {host.data<int64_t>(), host.data<int64_t>() + element_count(host.shape)};
}

TowerOutput GraphChain::encode_pictures(const PreparedPictures& pictures, Stopwatch& watch) const {
  const GeometryEntry& geometry = manifest_.geometry;
  TensorMap inputs;
  for (const TensorEntry& entry : manifest_.graphs.at("vision").inputs) {
    inputs[entry.name] = as_type(among(pictures.inputs, entry.name), data_type(entry.dtype));
  }
  const Stopwatch::Lap lap(watch, "vision");
  TensorMap outputs = graph("vision").run(inputs, {});
  std::optional<FeatureRows> rows =
      pictures.layout.rows_beforehand(geometry.tokens_per_tile, geometry.grid_rows * geometry.grid_columns);
  const Tensor* counts = find(outputs, names::kPatchCounts);
  if (!rows || counts != nullptr) {
    // What is left depends on the pictures: the host has to look.
    const Stopwatch::Lap waiting(watch, "wait.vision");
    const std::vector<int64_t> slots = integers(among(outputs, names::kPatchSlots));
    const std::vector<int64_t> numbers = counts == nullptr ? std::vector<int64_t>() : integers(*counts);
    rows = pictures.layout.rows_of(slots, counts == nullptr ? nullptr : &numbers);
  }
  return {pictures.layout, std::move(outputs), std::move(*rows)};
}

Tensor GraphChain::prefill(const std::vector<int64_t>& token_ids, const TowerOutput* tower, const GuideInputs* guide,
                           int64_t max_new_tokens, Sequence& sequence, Stopwatch& watch) const {
  const VisualLayout* visual_layout = tower == nullptr ? nullptr : &tower->layout;
  SequenceLayout layout(token_ids, image_token_id_, visual_layout);
  const int64_t axes = manifest_.geometry.position_axes;
  const std::vector<int64_t> positions = prompt_positions(axes, token_ids, image_token_id_, visual_layout);
  sequence.position = *std::max_element(positions.begin(), positions.end()) + 1;
  const TensorMap visual = visual_tokens(tower, watch);
  TensorMap state;
  {
    const Stopwatch::Lap lap(watch, "embed");
    state = embedded(token_ids, visual);
  }
  state[names::kPositionIds] = backend_.upload(int64_tensor(positions, {axes, layout.num_rows()}));
  state[names::kInputsEmbeds] = state[names::kHiddenStates];
  state[names::kPromptSlots] = state[names::kVisualSlots];
  if (manifest_.probe) {
    const Stopwatch::Lap lap(watch, "guide");
    replace(state, probe(layout, positions, visual, state, guide));
  }
  const SegmentCache::Geometry geometry = {manifest_.geometry.num_kv_heads, manifest_.geometry.head_dim, type_};
  for (size_t index = 0; index < manifest_.segments.size(); ++index) {
    const SegmentEntry& segment = manifest_.segments[index];
    TensorMap outputs;
    {
      const Stopwatch::Lap lap(watch, "prefill." + segment.graph);
      sequence.caches.emplace_back(backend_, segment.layers, geometry, layout.num_rows() + max_new_tokens);
      outputs = run_segment(index, state, sequence.caches.back(), layout.num_rows());
    }
    if (outputs.count(names::kLogits) != 0) return logits(outputs, watch);
    state[names::kHiddenStates] = among(outputs, names::out(names::kHiddenStates));
    if (tower != nullptr && index < manifest_.sites.size()) layout = drop(index, layout, state, outputs, sequence, watch);
  }
  throw BackendError("the last segment gives no logits: export the bundle again");
}

Tensor GraphChain::decode(int64_t token_id, Sequence& sequence, Stopwatch& watch) const {
  TensorMap state = embedded({token_id}, no_visual_);
  state[names::kPositionIds] = position_tensor(sequence.position);
  if (manifest_.probe) {
    add_missing(state, no_probe_);
    state[names::kProbeWeights] = backend_.upload(host_tensor({0, 1}, DataType::float32));
  }
  for (size_t index = 0; index < sequence.caches.size(); ++index) {
    SegmentCache& cache = sequence.caches[index];
    if (numberings_[index] == Numbering::renumbered) state[names::kPositionIds] = position_tensor(cache.length());
    const TensorMap outputs = run_segment(index, state, cache, 1);
    if (outputs.count(names::kLogits) != 0) {
      ++sequence.position;
      return logits(outputs, watch);
    }
    if (sequence.eviction && index + 1 == manifest_.sites.size()) evict(outputs, sequence, watch);
    state[names::kHiddenStates] = among(outputs, names::out(names::kHiddenStates));
  }
  throw BackendError("the last segment gives no logits: export the bundle again");
}

std::vector<SiteReport> GraphChain::site_reports(const Sequence& sequence) const {
  std::vector<SiteReport> reports;
  for (size_t index = 0; index < sequence.drops.size(); ++index) {
    const SiteEntry& site = manifest_.sites[index];
    const Sequence::Drop& drop = sequence.drops[index];
    SiteReport report{site.graph, site.place, drop.tokens_in, drop.kept, {}, {}};
    for (const int64_t slot : integers(drop.visual_slots)) {
      if (slot >= 0) report.indices.push_back(slot);
    }
    std::sort(report.indices.begin(), report.indices.end());
    reports.push_back(std::move(report));
  }
  if (sequence.eviction && !reports.empty()) reports.back().evictions = sequence.eviction->state.events();
  return reports;
}

Tensor GraphChain::position_tensor(int64_t position) const {
  const int64_t axes = manifest_.geometry.position_axes;
  return backend_.upload(int64_tensor(std::vector<int64_t>(static_cast<size_t>(axes), position), {axes, 1}));
}

TensorMap GraphChain::visual_tokens(const TowerOutput* tower, Stopwatch& watch) const {
  if (tower == nullptr) return no_visual_;
  const Stopwatch::Lap lap(watch, "projector");
  TensorMap available = {{names::kFeatureRows, int64_tensor(tower->rows.rows)}};
  add_missing(available, tower->outputs);
  TensorMap visual = graph("projector").run(selected(manifest_.graphs.at("projector").inputs, available), {});
  add_missing(visual, tower->outputs);
  return visual;
}

TensorMap GraphChain::embedded(const std::vector<int64_t>& token_ids, const TensorMap& visual) const {
  TensorMap available = {{names::kInputIds, int64_tensor(token_ids, {1, static_cast<int64_t>(token_ids.size())})}};
  add_missing(available, visual);
  TensorMap outputs = graph("embed").run(selected(manifest_.graphs.at("embed").inputs, available), {});
  among(outputs, names::kVisualSlots);  // or an error: every prompt reads it
  outputs[names::kHiddenStates] = among(outputs, names::kInputsEmbeds);
  outputs.erase(names::kInputsEmbeds);
  return outputs;
}

// The probe rows of a prompt; none for a prompt without pictures.
TensorMap GraphChain::probe(const SequenceLayout& layout, const std::vector<int64_t>& positions, const TensorMap& visual,
                            const TensorMap& state, const GuideInputs* guide) const {
  TensorMap rows;
  if (layout.num_images() == 0) {
    rows = no_probe_;
    rows[names::kProbeWeights] = host_tensor({0, layout.num_rows()}, DataType::float32);
    return rows;
  }
  const std::vector<int64_t> text_rows = layout.text_rows();
  const int64_t axes = manifest_.geometry.position_axes;
  std::vector<int64_t> first;
  for (int64_t axis = 0; axis < axes; ++axis) {
    first.push_back(positions[static_cast<size_t>(axis * layout.num_rows() + text_rows.front())]);
  }
  if (guide == nullptr) {
    Tensor uniform = zero_tensor({1, layout.num_rows()}, DataType::float32);
    for (const int64_t row : text_rows) {
      uniform.data<float>()[row] = static_cast<float>(1.0 / static_cast<double>(layout.num_text_rows()));
    }
    rows = {{names::kProbeWeights, uniform}, {names::kProbeOffset, zero_tensor({1, manifest_.geometry.hidden_size}, type_)}};
  } else {
    rows = graph("guide").run({{names::kGuideInputIds, guide->input_ids},
                               {names::kGuideTokenMap, guide->token_map},
                               {names::kImageEmbeds, among(visual, names::kImageEmbeds)},
                               {names::kClassFeatures, among(visual, names::kClassFeatures)},
                               {names::kTextRows, int64_tensor(text_rows)},
                               {names::kVisualSlots, among(state, names::kVisualSlots)}},
                              {});
  }
  rows[names::kProbePositionIds] = int64_tensor(first, {axes, 1});
  return rows;
}

TensorMap GraphChain::run_segment(size_t index, const TensorMap& state, SegmentCache& cache, int64_t num_new) const {
  const SegmentEntry& segment = manifest_.segments[index];
  TensorMap inputs = cache.past();
  // A graph that does not read one of them leaves it.
  for (const char* name : {names::kHiddenStates, names::kPositionIds, names::kDeepstackFeatures}) {
    if (const Tensor* tensor = find(state, name)) inputs[name] = *tensor;
  }
  if (segment.probe) {
    for (const char* name : {names::kProbeWeights, names::kProbeOffset, names::kProbePositionIds}) {
      inputs[name] = among(state, name);
    }
  }
  TensorMap outputs = graph(segment.graph).run(inputs, cache.present(num_new));
  cache.advance(num_new);
  return outputs;
}

// Runs the site behind a segment and carries the kept rows on.
SequenceLayout GraphChain::drop(size_t index, const SequenceLayout& layout, TensorMap& state, const TensorMap& outputs,
                                Sequence& sequence, Stopwatch& watch) const {
  const SiteEntry& site = manifest_.sites[index];
  TensorMap chosen;
  int64_t num_rows = 0;
  {
    const Stopwatch::Lap lap(watch, "select." + site.graph);
    TensorMap inputs;
    for (const TensorEntry& entry : manifest_.graphs.at(site.graph).inputs) {
      const Tensor* tensor = find(outputs, entry.name);
      if (tensor == nullptr) tensor = find(state, entry.name);
      inputs[entry.name] = tensor != nullptr ? *tensor : backend_.upload(layout.host_input(entry.name, site));
      if (is_of_prompt(entry.name)) state[entry.name] = inputs[entry.name];
    }
    chosen = graph(site.graph).run(inputs, {});
    const std::optional<int64_t> left = layout.visual_tokens_behind(site);
    if (left) {
      num_rows = layout.num_rows() - layout.num_visual() + *left;
    } else {
      // The count depends on the picture: the one number that crosses to the host.
      const Stopwatch::Lap waiting(watch, "wait." + site.graph);
      num_rows = integers(among(chosen, names::kKeepCount)).at(0);
    }
    if (const auto rows = pruner_choice(site, layout, chosen, among(state, names::kVisualSlots), num_rows, watch)) {
      chosen[names::kKeepIndices] = int64_tensor(*rows);
      num_rows = static_cast<int64_t>(rows->size());
    }
    if (num_rows < layout.num_text_rows() || num_rows > among(chosen, names::kKeepIndices).shape.at(0)) {
      throw BackendError("the graph '" + site.graph + "' keeps rows that there are none of: export the bundle again");
    }
  }
  {
    const Stopwatch::Lap lap(watch, "gather." + site.graph);
    if (manifest_.rate && chosen.count(names::kVisualRanks) != 0) {
      std::vector<int64_t> rows = integers(chosen.at(names::kKeepIndices));
      rows.resize(static_cast<size_t>(num_rows));
      const std::vector<int64_t> ranks = integers(chosen.at(names::kVisualRanks));
      for (int64_t& row : rows) row = ranks.at(static_cast<size_t>(row));
      sequence.eviction.emplace(Sequence::CacheEviction{Eviction(std::move(rows), layout.num_visual(), manifest_.rate->num_rates),
                                                        among(state, names::kVisualSlots), sequence.position});
    }
    // A site that merges tokens has appended rows to what travels on.
    for (auto& [name, tensor] : state) {
      if (const Tensor* longer = find(chosen, names::extended(name))) tensor = *longer;
    }
    const std::vector<TensorEntry>& carried = manifest_.graphs.at("gather").inputs;
    TensorMap inputs = {{names::kKeepIndices, chosen.at(names::kKeepIndices).view({num_rows})}};
    for (const TensorEntry& entry : carried) {
      if (entry.name != names::kKeepIndices) inputs[entry.name] = among(state, entry.name);
    }
    const TensorMap gathered = graph("gather").run(inputs, {});
    for (const TensorEntry& entry : carried) {
      if (entry.name != names::kKeepIndices) state[entry.name] = among(gathered, names::out(entry.name));
    }
  }
  if (site.positions != Numbering::original) {
    const int64_t axes = manifest_.geometry.position_axes;
    std::vector<int64_t> renumbered;
    for (int64_t axis = 0; axis < axes; ++axis) {
      for (int64_t row = 0; row < num_rows; ++row) renumbered.push_back(row);
    }
    state[names::kPositionIds] = backend_.upload(int64_tensor(renumbered, {axes, num_rows}));
  }
  SequenceLayout after = layout.keep(num_rows);
  sequence.drops.push_back({layout.num_visual(), after.num_visual(), among(state, names::kVisualSlots)});
  return after;
}

// The rows that the pruner keeps; none where the site's own choice of `num_rows` holds.
std::optional<std::vector<int64_t>> GraphChain::pruner_choice(const SiteEntry& site, const SequenceLayout& layout,
                                                              const TensorMap& chosen, const Tensor& visual_slots,
                                                              int64_t num_rows, Stopwatch& watch) const {
  const Tensor* scores = find(chosen, names::kScores);
  if (!pruner_ || scores == nullptr || layout.visual() == nullptr || layout.num_visual() == 0) return std::nullopt;
  std::vector<float> values;
  std::vector<int64_t> slots, own_rows;
  {
    const Stopwatch::Lap waiting(watch, "wait." + site.graph);
    const Tensor host = backend_.download(*scores);
    if (host.type != DataType::float32) throw BackendError("the graph '" + site.graph + "' gives scores of another type: export the bundle again");
    values.assign(host.data<float>(), host.data<float>() + element_count(host.shape));
    slots = integers(visual_slots);
    own_rows = integers(among(chosen, names::kKeepIndices));
    if (num_rows >= 0 && num_rows < static_cast<int64_t>(own_rows.size())) own_rows.resize(static_cast<size_t>(num_rows));
  }
  const Stopwatch::Lap lap(watch, "pruner." + site.graph);
  return choose_rows(pruner_, site, *layout.visual(), values, slots, own_rows, watch.elapsed_ms());
}

// Decides the rate of a generated token, and drops rows from the caches behind the site if it has grown.
void GraphChain::evict(const TensorMap& outputs, Sequence& sequence, Stopwatch& watch) const {
  Sequence::CacheEviction& eviction = *sequence.eviction;
  TensorMap available = {{names::kVisualSlots, eviction.visual_slots}};
  add_missing(available, outputs);
  int64_t rate = 0;
  {
    const Stopwatch::Lap lap(watch, "rate");
    const TensorMap chosen = graph("rate").run(selected(manifest_.graphs.at("rate").inputs, available), {});
    rate = integers(among(chosen, names::kRate)).at(0);
  }
  const size_t first = manifest_.sites.size();
  const int64_t generated = sequence.position - eviction.first_position + 1;
  const auto rows = eviction.state.rows_to_keep(rate, sequence.caches[first].length(), generated);
  if (!rows) return;
  const Stopwatch::Lap lap(watch, "evict");
  const Tensor kept = backend_.upload(int64_tensor(*rows));
  for (size_t index = first; index < sequence.caches.size(); ++index) sequence.caches[index].compact(graph("compact"), kept);
}

Tensor GraphChain::logits(const TensorMap& outputs, Stopwatch& watch) const {
  const Stopwatch::Lap lap(watch, "logits_to_host");
  return backend_.download(among(outputs, names::kLogits));
}

}  // namespace edgeprune
