// manifest.json: what a bundle holds and how to run it; the fields are those of edgeprune/manifest.py.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/json_object.h"

namespace edgeprune {

constexpr int kFormatVersion = 2;
constexpr const char* kManifestFile = "manifest.json";

struct FileEntry {
  std::string path;  // relative to the bundle, with forward slashes
  std::string sha256;
  int64_t bytes = 0;
};

// Of a tensor: a size, or the name of one that differs from run to run.
struct Dimension {
  std::string name;  // empty where the size is fixed
  int64_t size = 0;
};

struct TensorEntry {
  std::string name;
  std::string dtype;
  std::vector<Dimension> shape;
};

struct GraphEntry {
  FileEntry file;
  std::vector<FileEntry> data;
  std::vector<TensorEntry> inputs;
  std::vector<TensorEntry> outputs;
};

// Of the sizes those that running needs; all of them are checked.
struct GeometryEntry {
  int64_t hidden_size = 0;
  int64_t num_layers = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab_size = 0;
  int64_t position_axes = 1;  // 1, or 3 with M-RoPE
  int64_t grid_rows = 0;
  int64_t grid_columns = 0;
  std::optional<int64_t> tokens_per_tile;
};

struct SegmentEntry {
  std::string graph;
  std::vector<int64_t> layers;
  bool probe = false;
};

// What becomes of position ids behind a site.
enum class Numbering { original, renumbered, renumbered_in_prefill };

struct SiteEntry {
  std::string graph;
  std::string method;
  std::string place;
  int64_t layer = 0;
  std::optional<int64_t> keep_per_image;
  std::optional<double> keep_share;
  Numbering positions = Numbering::original;
  int64_t recycled_per_image = 0;
  int64_t merged_per_image = 0;
};

struct ProbeEntry {
  bool guided = false;
  std::optional<FileEntry> guide_tokenizer;
  int64_t guide_context_length = 0;
};

struct RateEntry {
  int64_t layer = 0;
  int64_t num_rates = 0;
};

// A range of sizes that an engine was built for.
struct ProfileEntry {
  struct Range {
    int64_t least = 0, tuned_for = 0, greatest = 0;
    bool holds(int64_t size) const { return least <= size && size <= greatest; }
  };

  std::string name;
  std::map<std::string, Range> ranges;  // by dimension
};

struct EngineEntry {
  FileEntry file;
  std::string onnx_sha256;
  std::vector<ProfileEntry> profiles;  // in the engine's order
};

// The engines of a target.
struct EngineSetEntry {
  std::string builder;  // "tensorrt" or "tensorrt_rtx"
  std::string tensorrt_version;
  int64_t sm = 0;  // compute capability, 87 for 8.7
  std::optional<std::string> plugin_version;
  std::map<std::string, EngineEntry> engines;  // by graph
};

struct Manifest {
  std::string edgeprune_version;
  std::string dtype;  // "float32" or "float16"
  GeometryEntry geometry;
  std::vector<SegmentEntry> segments;
  std::vector<SiteEntry> sites;
  std::optional<ProbeEntry> probe;
  std::optional<RateEntry> rate;
  std::map<std::string, GraphEntry> graphs;
  std::map<std::string, EngineSetEntry> engines;  // by target
  bool is_float8 = false;  // quantized to FP8, in part at least
  Json preprocessing;
  Json prompt;
  FileEntry tokenizer;

  // Decoder layers behind which DeepStack adds features of the vision tower; 0 in most families.
  int64_t deepstack_layers() const;
  // Every file that the manifest names but for the engines; some of them twice.
  std::vector<FileEntry> files() const;
};

// Of the file's text; errors name `path`. Throws BundleError: no JSON, of an unknown version, or inconsistent.
Manifest manifest_from_text(const std::string& text, const std::filesystem::path& path);
// Throws BundleError: the file is missing or unreadable, or its text is no manifest.
Manifest read_manifest(const std::filesystem::path& path);

}  // namespace edgeprune
