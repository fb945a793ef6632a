#include "bundle/manifest.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>

#include "decoder/tensor_names.h"
#include "error.h"

namespace edgeprune {
namespace {

// Sizes beyond any model: products of a few of them stay within 64 bits.
constexpr int64_t kLargestSize = int64_t{1} << 24;
constexpr uintmax_t kLargestManifest = 64u << 20;

std::string entry_place(const std::string& where, size_t index) { return where + "[" + std::to_string(index) + "]"; }

bool is_outside(const std::string& path) {
  if (path.empty() || path.front() == '/' || path.find_first_of(std::string("\\:\0", 3)) != std::string::npos) {
    return true;
  }
  std::stringstream parts(path);
  for (std::string part; std::getline(parts, part, '/');) {
    if (part == "..") return true;
  }
  return false;
}

FileEntry file_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"path", "sha256", "bytes"});
  FileEntry entry{fields.text("path"), fields.text("sha256"), fields.integer("bytes")};
  if (is_outside(entry.path)) throw BundleError("the manifest names a file outside the bundle: '" + entry.path + "'");
  const bool is_hash = entry.sha256.size() == 64 && entry.sha256.find_first_not_of("0123456789abcdef") == std::string::npos;
  if (!is_hash || entry.bytes < 0) {
    throw BundleError("the manifest's entry of '" + entry.path + "' has no usable sha256 or size");
  }
  return entry;
}

std::vector<TensorEntry> tensor_entries(const Json& list, const std::string& where) {
  std::vector<TensorEntry> entries;
  for (size_t index = 0; index < list.size(); ++index) {
    const std::string place = entry_place(where, index);
    const JsonObject fields(list[index], place, {"name", "dtype", "shape"});
    const Json& shape = fields.list("shape");
    std::vector<Dimension> dimensions;
    for (size_t axis = 0; axis < shape.size(); ++axis) {
      if (shape[axis].is_string()) {
        dimensions.push_back({shape[axis].get<std::string>(), 0});
      } else if (shape[axis].is_number_integer()) {
        dimensions.push_back({"", shape[axis].get<int64_t>()});
      } else {
        refuse_json(entry_place(place + ".shape", axis), shape[axis], "int or str");
      }
    }
    entries.push_back({fields.text("name"), fields.text("dtype"), std::move(dimensions)});
    const std::string& dtype = entries.back().dtype;
    if (dtype != "float32" && dtype != "float16" && dtype != "int64") {
      throw BundleError(place + ".dtype is '" + dtype + "', expected float32, float16 or int64");
    }
  }
  return entries;
}

GraphEntry graph_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"file", "data", "inputs", "outputs"});
  GraphEntry entry;
  entry.file = file_entry(fields.any("file"), fields.where("file"));
  const Json& files = fields.list("data");
  for (size_t index = 0; index < files.size(); ++index) {
    entry.data.push_back(file_entry(files[index], entry_place(fields.where("data"), index)));
  }
  entry.inputs = tensor_entries(fields.list("inputs"), fields.where("inputs"));
  entry.outputs = tensor_entries(fields.list("outputs"), fields.where("outputs"));
  return entry;
}

GeometryEntry geometry_entry(const Json& data, const std::string& where) {
  static const std::vector<const char*> sizes = {
      "hidden_size",       "intermediate_size",        "num_layers",          "num_heads",     "num_kv_heads",
      "head_dim",          "vocab_size",               "context_length",      "typical_tiles", "typical_tokens",
      "tokens_per_image",  "vision_hidden_size",       "vision_mlp_matrices", "vision_layers", "vision_class_tokens",
      "vision_window",     "vision_intermediate_size", "patches_per_token"};
  static const std::vector<const char*> lists = {"grid", "vision_global_layers", "vision_tokens", "projector_sizes"};
  static const std::vector<std::string> may_be_zero = {"vision_layers", "vision_class_tokens", "vision_window",
                                                       "vision_global_layers"};
  std::vector<const char*> required = sizes;
  required.insert(required.end(), lists.begin(), lists.end());
  required.insert(required.end(), {"positions", "tokens_per_tile"});
  const JsonObject fields(data, where, required);
  const auto check = [&](const char* name, int64_t value) {
    const bool zero = std::find(may_be_zero.begin(), may_be_zero.end(), name) != may_be_zero.end();
    if (value < (zero ? 0 : 1)) {
      throw BundleError(fields.where(name) + " is " + std::to_string(value) + ", expected at least " + (zero ? "0" : "1"));
    }
    if (value > kLargestSize) {
      throw BundleError(fields.where(name) + " is " + std::to_string(value) + ", expected at most " +
                        std::to_string(kLargestSize));
    }
  };
  for (const char* name : sizes) check(name, fields.integer(name));
  for (const char* name : lists) {
    for (const int64_t value : fields.integers(name)) check(name, value);
  }
  GeometryEntry entry;
  entry.hidden_size = fields.integer("hidden_size");
  entry.num_layers = fields.integer("num_layers");
  entry.num_kv_heads = fields.integer("num_kv_heads");
  entry.head_dim = fields.integer("head_dim");
  entry.vocab_size = fields.integer("vocab_size");
  entry.tokens_per_tile = fields.optional_integer("tokens_per_tile");
  if (entry.tokens_per_tile) check("tokens_per_tile", *entry.tokens_per_tile);
  const std::vector<int64_t> grid = fields.integers("grid");
  if (grid.size() != 2) throw BundleError(fields.where("grid") + " is " + fields.any("grid").dump() + ", expected rows and columns");
  entry.grid_rows = grid[0];
  entry.grid_columns = grid[1];
  const std::string positions = fields.text("positions");
  if (positions != "sequential" && positions != "multimodal") {
    throw BundleError(fields.where("positions") + " is '" + positions + "', known: sequential, multimodal");
  }
  entry.position_axes = positions == "multimodal" ? 3 : 1;
  return entry;
}

SegmentEntry segment_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"graph", "layers", "mlp_layers", "probe"});
  fields.integers("mlp_layers");
  SegmentEntry entry{fields.text("graph"), fields.integers("layers"), fields.flag("probe")};
  for (const int64_t layer : entry.layers) {
    if (layer < 0 || layer > kLargestSize) throw BundleError(fields.where("layers") + " is " + std::to_string(layer) + ", expected a layer");
  }
  return entry;
}

Numbering numbering(const std::string& name) {
  if (name == "original") return Numbering::original;
  if (name == "renumbered") return Numbering::renumbered;
  if (name == "renumbered in prefill") return Numbering::renumbered_in_prefill;
  throw BundleError("unknown numbering of positions '" + name + "', known: original, renumbered, renumbered in prefill");
}

SiteEntry site_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"graph", "method", "place", "layer", "before_mlp", "keep_per_image"},
                          {"keep_share", "positions", "recycled_per_image", "merged_per_image"});
  SiteEntry entry;
  entry.graph = fields.text("graph");
  entry.method = fields.text("method");
  entry.place = fields.text("place");
  entry.layer = fields.integer("layer");
  fields.flag("before_mlp");
  entry.keep_per_image = fields.optional_integer("keep_per_image");
  entry.keep_share = fields.optional_number("keep_share");
  if (fields.has("positions")) entry.positions = numbering(fields.text("positions"));
  entry.recycled_per_image = fields.integer_or("recycled_per_image", 0);
  entry.merged_per_image = fields.integer_or("merged_per_image", 0);
  for (const int64_t count : {entry.keep_per_image.value_or(0), entry.recycled_per_image, entry.merged_per_image}) {
    if (count < 0 || count > kLargestSize) throw BundleError(where + " counts " + std::to_string(count) + " tokens, expected from 0 to " + std::to_string(kLargestSize));
  }
  return entry;
}

ProbeEntry probe_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"guided", "guide_tokenizer", "guide_context_length"});
  ProbeEntry entry;
  entry.guided = fields.flag("guided");
  if (!fields.is_null("guide_tokenizer")) entry.guide_tokenizer = file_entry(fields.any("guide_tokenizer"), fields.where("guide_tokenizer"));
  entry.guide_context_length = fields.integer("guide_context_length");
  if (entry.guide_tokenizer && (entry.guide_context_length < 3 || entry.guide_context_length > kLargestSize)) {
    throw BundleError(fields.where("guide_context_length") + " is " + std::to_string(entry.guide_context_length) + ", expected at least 3");
  }
  return entry;
}

RateEntry rate_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"layer", "num_rates"});
  RateEntry entry{fields.integer("layer"), fields.integer("num_rates")};
  if (entry.num_rates < 1 || entry.num_rates > kLargestSize) throw BundleError(fields.where("num_rates") + " is " + std::to_string(entry.num_rates) + ", expected at least 1");
  return entry;
}

ProfileEntry profile_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"name", "ranges"});
  ProfileEntry entry{fields.text("name"), {}};
  const std::string place = fields.where("ranges");
  for (const auto& [name, range] : fields.object("ranges").items()) {
    const bool whole = range.is_array() && range.size() == 3 &&
                       std::all_of(range.begin(), range.end(), [](const Json& size) {
                         return size.is_number_unsigned() && size.get<uint64_t>() <= static_cast<uint64_t>(kLargestSize);
                       });
    if (!whole || range[0] > range[1] || range[1] > range[2]) {
      refuse_json(place + "." + name, range, "three sizes, ascending");
    }
    entry.ranges[name] = {range[0].get<int64_t>(), range[1].get<int64_t>(), range[2].get<int64_t>()};
  }
  return entry;
}

EngineEntry engine_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where, {"file", "key", "onnx_sha256", "profiles", "seconds"});
  fields.text("key");
  fields.number("seconds");
  EngineEntry entry{file_entry(fields.any("file"), fields.where("file")), fields.text("onnx_sha256"), {}};
  const Json& profiles = fields.list("profiles");
  for (size_t index = 0; index < profiles.size(); ++index) {
    entry.profiles.push_back(profile_entry(profiles[index], entry_place(fields.where("profiles"), index)));
  }
  return entry;
}

EngineSetEntry engine_set_entry(const Json& data, const std::string& where) {
  const JsonObject fields(data, where,
                          {"key", "builder", "tensorrt_version", "sm", "precision", "plugin_version", "strategy",
                           "strategy_bytes", "engines"});
  for (const char* name : {"key", "precision", "strategy"}) fields.text(name);
  fields.object("strategy_bytes");
  EngineSetEntry entry;
  entry.builder = fields.text("builder");
  entry.tensorrt_version = fields.text("tensorrt_version");
  entry.sm = fields.integer("sm");
  if (!fields.is_null("plugin_version")) entry.plugin_version = fields.text("plugin_version");
  for (const auto& [name, engine] : fields.object("engines").items()) {
    entry.engines.emplace(name, engine_entry(engine, fields.where("engines") + "." + name));
  }
  return entry;
}

void check_whole(const Manifest& manifest) {
  std::vector<std::string> needed = {"vision", "projector", "embed"};
  for (const SegmentEntry& segment : manifest.segments) needed.push_back(segment.graph);
  for (const SiteEntry& site : manifest.sites) needed.push_back(site.graph);
  if (!manifest.sites.empty()) needed.emplace_back("gather");
  if (manifest.rate) needed.insert(needed.end(), {"rate", "compact"});
  if (manifest.probe && manifest.probe->guided) needed.emplace_back("guide");
  for (const std::string& name : needed) {
    if (manifest.graphs.count(name) == 0) throw BundleError("the manifest lacks the graph '" + name + "': export the checkpoint again");
  }
  if (manifest.segments.empty() || manifest.sites.size() != manifest.segments.size() - 1) {
    throw BundleError("the manifest's sites do not lie between its segments: export the checkpoint again");
  }
  if (manifest.deepstack_layers() < 0 || manifest.deepstack_layers() > manifest.geometry.num_layers) {
    throw BundleError("the manifest's projector has features for " + std::to_string(manifest.deepstack_layers()) + " of " +
                      std::to_string(manifest.geometry.num_layers) + " decoder layers: export the checkpoint again");
  }
  if (manifest.probe && manifest.probe->guided && !manifest.probe->guide_tokenizer) {
    throw BundleError("the manifest's probe is guided and names no guide_tokenizer: export the checkpoint again");
  }
  if (manifest.rate && manifest.sites.empty()) {
    throw BundleError("the manifest has a rate and no site: export the checkpoint again");
  }
}

bool has_float8(const Json& quantization, const std::string& where) {
  if (!quantization.is_object()) refuse_json(where, quantization, "an object");
  for (const char* part : {"decoder", "vision"}) {
    if (!quantization.contains(part) || !quantization[part].is_object()) continue;
    if (quantization[part].value("precision", Json()) == "fp8") return true;
  }
  return false;
}

BundleError unreadable(const std::filesystem::path& path) {
  return BundleError(path.string() + " is not readable JSON: copy the bundle again");
}

Json manifest_json(const std::string& text, const std::filesystem::path& path) {
  try {
    return parse_json(text);
  } catch (const std::invalid_argument&) {
    throw unreadable(path);
  }
}

}  // namespace

int64_t Manifest::deepstack_layers() const {
  for (const TensorEntry& entry : graphs.at("projector").outputs) {
    if (entry.name == names::kImageDeepstackFeatures && !entry.shape.empty()) return entry.shape.front().size;
  }
  return 0;
}

std::vector<FileEntry> Manifest::files() const {
  std::vector<FileEntry> entries = {tokenizer};
  if (probe && probe->guide_tokenizer) entries.push_back(*probe->guide_tokenizer);
  for (const auto& [name, graph] : graphs) {
    entries.push_back(graph.file);
    entries.insert(entries.end(), graph.data.begin(), graph.data.end());
  }
  return entries;
}

Manifest manifest_from_text(const std::string& text, const std::filesystem::path& path) {
  const Json data = manifest_json(text, path);
  const Json version = data.is_object() && data.contains("format_version") ? data["format_version"] : Json();
  if (version != Json(kFormatVersion)) {
    throw BundleError(path.string() + " has format_version " + version.dump() + ", this edgeprune reads " +
                      std::to_string(kFormatVersion) + ": export the checkpoint again, or install the edgeprune that wrote it");
  }
  const JsonObject fields(data, kManifestFile,
                          {"edgeprune_version", "source", "dtype", "opset", "geometry", "pruning", "segments", "sites",
                           "probe", "graphs", "preprocessing", "prompt", "tokenizer", "parity"},
                          {"rate", "calibration", "quantization", "engines", "format_version"});
  Manifest manifest;
  manifest.edgeprune_version = fields.text("edgeprune_version");
  manifest.dtype = fields.text("dtype");
  if (manifest.dtype != "float32" && manifest.dtype != "float16") {
    throw BundleError(fields.where("dtype") + " is '" + manifest.dtype + "', known: float32, float16");
  }
  manifest.geometry = geometry_entry(fields.any("geometry"), fields.where("geometry"));
  const Json& segments = fields.list("segments");
  for (size_t index = 0; index < segments.size(); ++index) {
    manifest.segments.push_back(segment_entry(segments[index], entry_place(fields.where("segments"), index)));
  }
  const Json& sites = fields.list("sites");
  for (size_t index = 0; index < sites.size(); ++index) {
    manifest.sites.push_back(site_entry(sites[index], entry_place(fields.where("sites"), index)));
  }
  if (!fields.is_null("probe")) manifest.probe = probe_entry(fields.any("probe"), fields.where("probe"));
  if (!fields.is_null("rate")) manifest.rate = rate_entry(fields.any("rate"), fields.where("rate"));
  for (const auto& [name, graph] : fields.object("graphs").items()) {
    manifest.graphs.emplace(name, graph_entry(graph, fields.where("graphs") + "." + name));
  }
  if (!fields.is_null("engines")) {
    for (const auto& [target, engines] : fields.object("engines").items()) {
      manifest.engines.emplace(target, engine_set_entry(engines, fields.where("engines") + "." + target));
    }
  }
  if (!fields.is_null("quantization")) {
    manifest.is_float8 = has_float8(fields.any("quantization"), fields.where("quantization"));
  }
  manifest.preprocessing = fields.object("preprocessing");
  manifest.prompt = fields.object("prompt");
  manifest.tokenizer = file_entry(fields.any("tokenizer"), fields.where("tokenizer"));
  check_whole(manifest);
  return manifest;
}

Manifest read_manifest(const std::filesystem::path& path) {
  std::error_code failed;
  if (!std::filesystem::exists(path, failed)) {
    throw BundleError(path.parent_path().string() + " is no bundle: it has no " + kManifestFile + "; make one with edgeprune export");
  }
  const uintmax_t size = std::filesystem::file_size(path, failed);
  if (failed || size > kLargestManifest) throw unreadable(path);
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) throw unreadable(path);
  return manifest_from_text(text, path);
}

}  // namespace edgeprune
