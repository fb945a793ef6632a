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

struct TensorEntry {
  std::string name;
  std::string dtype;
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

struct Manifest {
  std::string edgeprune_version;
  std::string dtype;  // "float32" or "float16"
  GeometryEntry geometry;
  std::vector<SegmentEntry> segments;
  std::vector<SiteEntry> sites;
  std::optional<ProbeEntry> probe;
  std::optional<RateEntry> rate;
  std::map<std::string, GraphEntry> graphs;
  bool is_float8 = false;  // quantized to FP8, in part at least
  Json preprocessing;
  Json prompt;
  FileEntry tokenizer;

  // Every file that the manifest names; some of them twice.
  std::vector<FileEntry> files() const;
};

// Throws BundleError: the file is missing, unreadable, of an unknown version, or inconsistent.
Manifest read_manifest(const std::filesystem::path& path);

}  // namespace edgeprune
