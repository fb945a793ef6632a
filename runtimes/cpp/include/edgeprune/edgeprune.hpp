// libedgeprune for C++17: owners of the C ABI's handles, errors as exceptions. Header only; see edgeprune.h.
#ifndef EDGEPRUNE_EDGEPRUNE_HPP
#define EDGEPRUNE_EDGEPRUNE_HPP

#include <algorithm>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "edgeprune/edgeprune.h"

namespace edgeprune {
inline namespace abi_1 {

// One line: the cause, then what mends it.
class Exception : public std::runtime_error {
 public:
  Exception(edgeprune_status status, const char* message) : std::runtime_error(message), status_(status) {}
  edgeprune_status status() const noexcept { return status_; }

 private:
  edgeprune_status status_;
};

inline void check(edgeprune_status status) {
  if (status != EDGEPRUNE_OK) throw Exception(status, edgeprune_last_error());
}

class Image {
 public:
  static Image read(const std::string& path) {
    edgeprune_picture* made = nullptr;
    check(edgeprune_picture_read(path.c_str(), &made));
    return Image(made);
  }
  // Of a PNG or JPEG file's bytes.
  static Image decode(const uint8_t* file, size_t size) {
    edgeprune_picture* made = nullptr;
    check(edgeprune_picture_decode(file, size, &made));
    return Image(made);
  }
  // Of 8-bit pixels [height, width, channels]; a stride of 0 means that rows follow each other.
  static Image from_pixels(const uint8_t* pixels, int64_t width, int64_t height, int64_t channels, int64_t stride = 0) {
    edgeprune_picture* made = nullptr;
    check(edgeprune_picture_from_pixels(pixels, width, height, channels, stride != 0 ? stride : width * channels, &made));
    return Image(made);
  }
  std::pair<int64_t, int64_t> size() const {
    std::pair<int64_t, int64_t> size;
    edgeprune_picture_size(handle_.get(), &size.first, &size.second);
    return size;
  }
  const edgeprune_picture* get() const { return handle_.get(); }

 private:
  struct Release {
    void operator()(edgeprune_picture* handle) const { edgeprune_picture_release(handle); }
  };
  explicit Image(edgeprune_picture* handle) : handle_(handle) {}

  std::unique_ptr<edgeprune_picture, Release> handle_;
};

struct Options {
  int64_t max_new_tokens = 64;
  double temperature = 0;
  int64_t top_k = 0;
  double top_p = 1;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;  // go on behind the model's end token
};

struct Site {
  std::string name;
  std::string place;
  int64_t tokens_in = 0;
  int64_t kept = 0;
  std::vector<int64_t> indices;
  std::vector<std::pair<int64_t, int64_t>> evictions;  // generated tokens, visual tokens left
};

class Reply {
 public:
  explicit Reply(edgeprune_answer* handle) : handle_(handle) {}

  std::string text() const { return edgeprune_answer_text(handle_.get()); }
  std::string finish_reason() const { return edgeprune_answer_finish_reason(handle_.get()); }
  std::string json() const { return edgeprune_answer_json(handle_.get()); }
  std::vector<int64_t> token_ids() const {
    size_t count = 0;
    const int64_t* ids = edgeprune_answer_token_ids(handle_.get(), &count);
    return std::vector<int64_t>(ids, ids + count);
  }
  int64_t prompt_tokens() const { return edgeprune_answer_prompt_tokens(handle_.get()); }
  int64_t decode_steps() const { return edgeprune_answer_decode_steps(handle_.get()); }
  // Milliseconds of a stage, such as "time_to_first_token"; 0 where it did not run.
  double timing_ms(const std::string& name) const { return edgeprune_answer_timing_ms(handle_.get(), name.c_str()); }
  std::vector<std::pair<std::string, double>> timings_ms() const {
    std::vector<std::pair<std::string, double>> timings;
    for (size_t index = 0; index < edgeprune_answer_num_timings(handle_.get()); ++index) {
      const char* name = nullptr;
      double milliseconds = 0;
      check(edgeprune_answer_timing(handle_.get(), index, &name, &milliseconds));
      timings.emplace_back(name, milliseconds);
    }
    return timings;
  }
  std::vector<Site> sites() const {
    std::vector<Site> sites;
    for (size_t index = 0; index < edgeprune_answer_num_sites(handle_.get()); ++index) {
      edgeprune_site raw{};
      raw.struct_size = sizeof raw;
      check(edgeprune_answer_site(handle_.get(), index, &raw));
      Site site{raw.name, raw.place, raw.tokens_in, raw.kept, {raw.indices, raw.indices + raw.num_indices}, {}};
      for (size_t event = 0; event < raw.num_evictions; ++event) {
        site.evictions.emplace_back(raw.evictions[2 * event], raw.evictions[2 * event + 1]);
      }
      sites.push_back(std::move(site));
    }
    return sites;
  }

 private:
  struct Release {
    void operator()(edgeprune_answer* handle) const { edgeprune_answer_release(handle); }
  };
  std::unique_ptr<edgeprune_answer, Release> handle_;
};

// Where a visual token stands in its picture.
struct Place {
  int64_t picture, grid, row, column;
  int64_t rows, columns;  // of the grid
};

// The visual tokens that have reached a pruning site, in the order of the prompt.
struct SiteScores {
  std::string name;
  std::string place;  // in words
  int64_t layer = 0;
  std::vector<float> scores;
  std::vector<int64_t> slots;
  std::vector<Place> places;
  std::vector<int64_t> own_choice;  // the indices that the bundle itself would keep
  double elapsed_ms = 0;            // since the answer began

  // Indices of the `count` highest scores (at least 1, at most all), ascending.
  std::vector<int64_t> highest(int64_t count) const {
    std::vector<int64_t> keep(scores.size());
    const int64_t found = edgeprune_keep_highest(scores.data(), static_cast<int64_t>(scores.size()), count, keep.data());
    if (found < 0) throw std::bad_alloc();
    keep.resize(static_cast<size_t>(found));
    return keep;
  }
};

// Returns the indices of the visual tokens that stay: at least one, each once, in any order. Threads that share a session
// call it at once. What it throws, ask() throws.
using Pruner = std::function<std::vector<int64_t>(const SiteScores& site)>;

// Takes a piece of the answer; false ends it there. What it throws, ask() throws.
using OnPiece = std::function<bool(std::string_view piece)>;

// Threads may share a session.
class VisionSession {
 public:
  struct Settings {
    std::string provider = "cpu";
    int threads = 0;              // of an operator in ONNX Runtime; 0 lets it choose
    std::string runtime_library;  // empty looks for it
    Pruner pruner;                // chooses at the sites that give their scores; empty leaves it to the bundle
    // Or "tensorrt", with the engines that the bundle holds.
    std::string backend = "onnxruntime";
  };

  explicit VisionSession(const std::string& bundle) : VisionSession(bundle, Settings()) {}
  VisionSession(const std::string& bundle, const Settings& settings) {
    edgeprune_session_options options;
    edgeprune_session_options_init(&options);
    options.backend = settings.backend.c_str();
    options.provider = settings.provider.c_str();
    options.threads = settings.threads;
    options.runtime_library = settings.runtime_library.empty() ? nullptr : settings.runtime_library.c_str();
    if (settings.pruner) {
      pruner_ = std::make_unique<Pruner>(settings.pruner);
      options.pruner = &prune;
      options.pruner_user = pruner_.get();
    }
    edgeprune_session* made = nullptr;
    check(edgeprune_session_open(bundle.c_str(), &options, &made));
    handle_.reset(made);
  }

  Reply ask(const std::vector<Image>& images, const std::string& prompt, const Options& options = {},
            const OnPiece& on_piece = nullptr) const {
    std::vector<const edgeprune_picture*> pictures;
    for (const Image& image : images) pictures.push_back(image.get());
    std::vector<const char*> stop;
    for (const std::string& text : options.stop) stop.push_back(text.c_str());
    edgeprune_generation_options raw;
    edgeprune_generation_options_init(&raw);
    raw.max_new_tokens = options.max_new_tokens;
    raw.temperature = options.temperature;
    raw.top_k = options.top_k;
    raw.top_p = options.top_p;
    raw.has_seed = options.seed ? 1 : 0;
    raw.seed = options.seed.value_or(0);
    raw.stop = stop.data();
    raw.num_stop = stop.size();
    raw.ignore_eos = options.ignore_eos ? 1 : 0;
    Stream stream{&on_piece, nullptr};
    pruner_thrown() = nullptr;
    edgeprune_answer* made = nullptr;
    const edgeprune_status status = edgeprune_ask(handle_.get(), pictures.data(), pictures.size(), prompt.c_str(), &raw,
                                                  on_piece ? &Stream::pass_on : nullptr, &stream, &made);
    std::optional<Reply> reply;
    if (status == EDGEPRUNE_OK) reply.emplace(made);
    if (std::exception_ptr thrown = std::exchange(pruner_thrown(), nullptr)) std::rethrow_exception(thrown);
    if (stream.thrown) std::rethrow_exception(stream.thrown);
    check(status);
    return std::move(*reply);
  }

 private:
  struct Close {
    void operator()(edgeprune_session* handle) const { edgeprune_session_close(handle); }
  };
  // No exception crosses the C ABI: it waits here.
  struct Stream {
    const OnPiece* on_piece;
    std::exception_ptr thrown;

    static int32_t pass_on(const char* piece, size_t size, void* user) noexcept {
      auto* stream = static_cast<Stream*>(user);
      try {
        return (*stream->on_piece)(std::string_view(piece, size)) ? 0 : 1;
      } catch (...) {
        stream->thrown = std::current_exception();
        return 1;
      }
    }
  };

  // The pruner is called on the thread that asks: what it throws waits there.
  static std::exception_ptr& pruner_thrown() {
    static thread_local std::exception_ptr thrown;
    return thrown;
  }
  static int64_t prune(const edgeprune_site_scores* raw, int64_t* keep, void* user) noexcept {
    try {
      SiteScores site;
      site.name = raw->name;
      site.place = raw->place;
      site.layer = raw->layer;
      site.scores.assign(raw->scores, raw->scores + raw->num_tokens);
      site.slots.assign(raw->slots, raw->slots + raw->num_tokens);
      for (int64_t token = 0; token < raw->num_tokens; ++token) {
        const int64_t* place = raw->places + 6 * token;
        site.places.push_back({place[0], place[1], place[2], place[3], place[4], place[5]});
      }
      site.own_choice.assign(raw->own_choice, raw->own_choice + raw->num_own_choice);
      site.elapsed_ms = raw->elapsed_ms;
      const std::vector<int64_t> kept = (*static_cast<const Pruner*>(user))(site);
      // What has no room is refused by its number.
      std::copy_n(kept.begin(), std::min(kept.size(), site.scores.size()), keep);
      return static_cast<int64_t>(kept.size());
    } catch (...) {
      pruner_thrown() = std::current_exception();
      return EDGEPRUNE_PRUNER_FAILED;
    }
  }

  std::unique_ptr<Pruner> pruner_;  // the session refers to it
  std::unique_ptr<edgeprune_session, Close> handle_;
};

}  // namespace abi_1
}  // namespace edgeprune

#endif
