#include "session.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "decoder/stop_matcher.h"
#include "error.h"
#include "numbers.h"
#include "text/incremental_decoder.h"

namespace edgeprune {

double Answer::timing(const std::string& name) const {
  for (const auto& [known, milliseconds] : timings_ms) {
    if (known == name) return milliseconds;
  }
  return 0;
}

double Answer::decode_tokens_per_second() const {
  const double decode = timing("decode");
  return decode > 0 ? 1000 * static_cast<double>(decode_steps) / decode : 0;
}

std::string Answer::to_json() const {
  using OrderedJson = nlohmann::ordered_json;
  OrderedJson reports = OrderedJson::array(), timings = OrderedJson::object();
  for (const SiteReport& site : sites) {
    OrderedJson evictions = OrderedJson::array();
    for (const EvictionEvent& event : site.evictions) evictions.push_back({event.generated, event.left});
    reports.push_back({{"name", site.name},
                       {"place", site.place},
                       {"tokens_in", site.tokens_in},
                       {"kept", site.kept},
                       {"indices", site.indices},
                       {"evictions", evictions}});
  }
  for (const auto& [name, milliseconds] : timings_ms) timings[name] = rounded_to(milliseconds, 3);
  const OrderedJson whole = {{"text", text},
                             {"token_ids", token_ids},
                             {"finish_reason", finish_reason},
                             {"prompt_tokens", prompt_tokens},
                             {"decode_steps", decode_steps},
                             {"sites", reports},
                             {"timings_ms", timings}};
  return whole.dump(-1, ' ', false, OrderedJson::error_handler_t::replace);
}

namespace {

BackendOptions fitting(BackendOptions options, const Manifest& manifest) {
  options.fuse_quantized = !manifest.is_float8;
  return options;
}

}  // namespace

Session::Session(const std::filesystem::path& bundle, const BackendOptions& options, Pruner pruner)
    : bundle_(bundle),
      preprocessing_(preprocessing_from_json(bundle_.manifest().preprocessing)),
      backend_(open_backend(fitting(options, bundle_.manifest()))),
      prompts_(bundle_, backend_->longest_sequence(bundle_)) {
  if (pruner) check_takes_pruner(bundle_.manifest());
  const auto& probe = bundle_.manifest().probe;
  if (probe && probe->guide_tokenizer) {
    guide_ = std::make_unique<GuideEncoder>(bundle_, *probe->guide_tokenizer, probe->guide_context_length);
  }
  chain_ = std::make_unique<GraphChain>(bundle_, *backend_, std::move(pruner));
}

Answer Session::answer(const std::vector<Picture>& pictures, const std::string& prompt, const SamplingOptions& options,
                       const PieceCallback& callback) const {
  options.check();
  Stopwatch watch;
  Answer answer;
  Sequence sequence;
  TokenSampler sampler(options);
  std::optional<TowerOutput> tower;
  int64_t token = 0;
  {
    const Stopwatch::Lap first(watch, "time_to_first_token");
    // Before the pictures cost anything: is this a prompt?
    const std::string rendered = prompts_.render(prompt, pictures.size());
    if (!pictures.empty()) {
      std::optional<PreparedPictures> prepared;
      {
        const Stopwatch::Lap lap(watch, "preprocess");
        const GeometryEntry& geometry = bundle_.manifest().geometry;
        prepared = preprocessing_->prepare(pictures, geometry.grid_rows, geometry.grid_columns);
      }
      tower = chain_->encode_pictures(*prepared, watch);
    }
    std::vector<int64_t> ids;
    std::optional<GuideInputs> guide;
    {
      const Stopwatch::Lap lap(watch, "tokenize");
      const EncodedPrompt encoded =
          prompts_.encode(rendered, tower ? tower->rows.tokens_per_image : std::vector<int64_t>(), options.max_new_tokens);
      if (guide_ != nullptr && tower) guide = guide_->encode(encoded);
      ids = encoded.ids();
    }
    answer.prompt_tokens = static_cast<int64_t>(ids.size());
    const Tensor logits = chain_->prefill(ids, tower ? &*tower : nullptr, guide ? &*guide : nullptr, options.max_new_tokens,
                                          sequence, watch);
    token = sampler.choose(logits);
  }
  IncrementalDecoder detokenizer(prompts_.tokenizer());
  StopMatcher stops(options.stop);
  const std::vector<int64_t> ends = options.ignore_eos ? std::vector<int64_t>() : prompts_.format().eos_token_ids;
  watch.add("decode", 0);
  answer.finish_reason = "length";
  bool cancelled = false;
  const auto emit = [&](const std::string& piece) {
    if (piece.empty()) return;
    answer.text += piece;
    cancelled = callback && !callback(piece);
  };
  while (true) {
    if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
      answer.finish_reason = "end";
      break;
    }
    answer.token_ids.push_back(token);
    const auto [piece, stopped] = stops.push(detokenizer.push(token));
    emit(piece);
    if (stopped || cancelled) {
      answer.finish_reason = stopped ? "stop" : "cancelled";
      break;
    }
    if (static_cast<int64_t>(answer.token_ids.size()) == options.max_new_tokens) break;
    const Stopwatch::Lap lap(watch, "decode");
    token = sampler.choose(chain_->decode(token, sequence, watch));
    ++answer.decode_steps;
  }
  if (answer.finish_reason == "end" || answer.finish_reason == "length") {
    auto [piece, stopped] = stops.push(detokenizer.finish());
    if (!stopped) piece += stops.finish();
    if (stopped) answer.finish_reason = "stop";
    emit(piece);
  }
  // What happens between two pieces is the caller's time.
  watch.add("total", watch.of("time_to_first_token") + watch.of("decode"));
  answer.sites = chain_->site_reports(sequence);
  answer.timings_ms = watch.entries();
  return answer;
}

}  // namespace edgeprune
