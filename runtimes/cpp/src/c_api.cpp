// The C ABI over Session: handles, statuses, and no exception that leaves.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeprune/edgeprune.h"
#include "error.h"
#include "pictures/picture_file.h"
#include "session.h"
#include "text/unicode.h"

struct edgeprune_session {
  edgeprune::Session session;
};

struct edgeprune_picture {
  edgeprune::Picture picture;
};

struct edgeprune_answer {
  explicit edgeprune_answer(edgeprune::Answer whole) : answer(std::move(whole)), json(answer.to_json()) {
    for (const edgeprune::SiteReport& site : answer.sites) {
      evictions.emplace_back();
      for (const edgeprune::EvictionEvent& event : site.evictions) {
        evictions.back().insert(evictions.back().end(), {event.generated, event.left});
      }
    }
  }
  edgeprune::Answer answer;
  std::string json;
  std::vector<std::vector<int64_t>> evictions;  // by site, in pairs
};

namespace {

// Fixed, so that it can be written where there is no memory.
thread_local char last_error[2048] = "";

edgeprune_status failed(edgeprune_status status, const char* message) {
  std::strncpy(last_error, message, sizeof last_error - 1);
  // Not through a character's bytes.
  size_t end = std::strlen(last_error);
  if (end == sizeof last_error - 1) {
    while (end > 0 && (static_cast<unsigned char>(last_error[end - 1]) & 0xC0) == 0x80) --end;
    if (end > 0 && static_cast<unsigned char>(last_error[end - 1]) >= 0xC0) --end;
    last_error[end] = '\0';
  }
  std::replace(last_error, last_error + end, '\n', ' ');
  return status;
}

edgeprune_status status_of(edgeprune::ErrorKind kind) {
  switch (kind) {
    case edgeprune::ErrorKind::argument:
      return EDGEPRUNE_ERROR_ARGUMENT;
    case edgeprune::ErrorKind::bundle:
      return EDGEPRUNE_ERROR_BUNDLE;
    case edgeprune::ErrorKind::picture:
      return EDGEPRUNE_ERROR_PICTURE;
    case edgeprune::ErrorKind::prompt:
      return EDGEPRUNE_ERROR_PROMPT;
    case edgeprune::ErrorKind::backend:
      return EDGEPRUNE_ERROR_BACKEND;
    case edgeprune::ErrorKind::pruning:
      return EDGEPRUNE_ERROR_PRUNING;
  }
  return EDGEPRUNE_ERROR_INTERNAL;
}

template <typename Body>
edgeprune_status guarded(Body body) {
  try {
    body();
    return EDGEPRUNE_OK;
  } catch (const edgeprune::Error& error) {
    // A damaged file's own bytes may be quoted.
    return failed(status_of(error.kind()), edgeprune::utf8_lossy(error.what()).c_str());
  } catch (const std::bad_alloc&) {
    return failed(EDGEPRUNE_ERROR_MEMORY, "no memory is left: lower max_new_tokens, give smaller or fewer pictures");
  } catch (const std::length_error&) {
    return failed(EDGEPRUNE_ERROR_MEMORY, "a tensor would be larger than any memory: export the bundle again");
  } catch (const std::exception& error) {
    return failed(EDGEPRUNE_ERROR_INTERNAL, error.what());
  } catch (...) {
    return failed(EDGEPRUNE_ERROR_INTERNAL, "an unknown exception: please report it");
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) throw edgeprune::ArgumentError(std::string(name) + " is NULL: give a pointer");
}

template <typename T>
void clear(T** out) {
  if (out != nullptr) *out = nullptr;
}

// The caller's struct may be older and shorter, or newer and longer than ours.
template <typename Options>
Options known_part(const Options* given, void (*init)(Options*)) {
  Options options;
  init(&options);
  if (given == nullptr) return options;
  if (given->struct_size < sizeof(size_t) || given->struct_size > 4096) {
    throw edgeprune::ArgumentError("struct_size is " + std::to_string(given->struct_size) +
                                   ": fill the options with the function that sets the defaults");
  }
  std::memcpy(&options, given, std::min(given->struct_size, sizeof options));
  return options;
}

std::string text_or(const char* text, const char* otherwise) { return text != nullptr ? text : otherwise; }

template <typename Reader>
edgeprune_status make_picture(edgeprune_picture** picture, Reader reader) {
  clear(picture);
  return guarded([&] {
    require(picture, "picture");
    *picture = new edgeprune_picture{reader()};
  });
}

edgeprune::SamplingOptions sampling_options(const edgeprune_generation_options* given) {
  const edgeprune_generation_options known = known_part(given, edgeprune_generation_options_init);
  edgeprune::SamplingOptions options;
  options.max_new_tokens = known.max_new_tokens;
  options.temperature = known.temperature;
  options.top_k = known.top_k;
  options.top_p = known.top_p;
  if (known.has_seed != 0) options.seed = known.seed;
  if (known.num_stop > 0) require(known.stop, "stop");
  for (size_t index = 0; index < known.num_stop; ++index) {
    require(known.stop[index], "stop");
    options.stop.emplace_back(known.stop[index]);
  }
  return options;
}

// A callback of C as the session takes it.
edgeprune::Pruner pruner_of(const edgeprune_session_options& options) {
  if (options.pruner == nullptr) return nullptr;
  return [callback = options.pruner, user = options.pruner_user](const edgeprune::SiteScores& site) {
    const edgeprune_site_scores raw = {sizeof raw,
                                       site.name.c_str(),
                                       site.place.c_str(),
                                       site.layer,
                                       site.num_tokens(),
                                       site.scores.data(),
                                       site.slots.data(),
                                       site.places.data(),
                                       site.own_choice.data(),
                                       static_cast<int64_t>(site.own_choice.size()),
                                       site.elapsed_ms};
    std::vector<int64_t> keep(site.scores.size());
    const int64_t count = callback(&raw, keep.data(), user);
    if (count < 0) {
      throw edgeprune::PruningError("the pruner failed " + site.where() + " with " + std::to_string(count) +
                                    ": mend what it stands for, or open the bundle without a pruner");
    }
    edgeprune::check_num_kept(site, count);
    keep.resize(static_cast<size_t>(count));
    return keep;
  };
}

}  // namespace

const char* edgeprune_version(void) { return EDGEPRUNE_VERSION; }

int32_t edgeprune_abi_version(void) { return EDGEPRUNE_ABI_VERSION; }

const char* edgeprune_last_error(void) { return last_error; }

void edgeprune_session_options_init(edgeprune_session_options* options) {
  if (options != nullptr) *options = {sizeof *options, "onnxruntime", "cpu", 0, nullptr, nullptr, nullptr};
}

int64_t edgeprune_keep_highest(const float* scores, int64_t num_tokens, int64_t count, int64_t* keep) {
  if (scores == nullptr || keep == nullptr || num_tokens < 1) return 0;
  try {
    const std::vector<int64_t> highest = edgeprune::highest_scores(scores, num_tokens, count);
    std::copy(highest.begin(), highest.end(), keep);
    return static_cast<int64_t>(highest.size());
  } catch (const std::bad_alloc&) {
    return EDGEPRUNE_PRUNER_FAILED;
  }
}

edgeprune_status edgeprune_session_open(const char* bundle, const edgeprune_session_options* options,
                                        edgeprune_session** session) {
  clear(session);
  return guarded([&] {
    require(bundle, "bundle");
    require(session, "session");
    const edgeprune_session_options known = known_part(options, edgeprune_session_options_init);
    edgeprune::BackendOptions backend;
    backend.backend = text_or(known.backend, "onnxruntime");
    backend.provider = text_or(known.provider, "cpu");
    backend.threads = known.threads;
    backend.library = text_or(known.runtime_library, "");
    *session = new edgeprune_session{edgeprune::Session(bundle, backend, pruner_of(known))};
  });
}

void edgeprune_session_close(edgeprune_session* session) { delete session; }

edgeprune_status edgeprune_picture_read(const char* path, edgeprune_picture** picture) {
  return make_picture(picture, [&] {
    require(path, "path");
    return edgeprune::read_picture(path);
  });
}

edgeprune_status edgeprune_picture_decode(const uint8_t* file, size_t size, edgeprune_picture** picture) {
  return make_picture(picture, [&] {
    require(file, "file");
    return edgeprune::decode_picture(file, size);
  });
}

edgeprune_status edgeprune_picture_from_pixels(const uint8_t* pixels, int64_t width, int64_t height, int64_t channels,
                                               int64_t stride, edgeprune_picture** picture) {
  return make_picture(picture, [&] {
    require(pixels, "pixels");
    return edgeprune::picture_from_pixels(pixels, width, height, channels, stride);
  });
}

void edgeprune_picture_size(const edgeprune_picture* picture, int64_t* width, int64_t* height) {
  if (width != nullptr) *width = picture != nullptr ? picture->picture.width : 0;
  if (height != nullptr) *height = picture != nullptr ? picture->picture.height : 0;
}

void edgeprune_picture_release(edgeprune_picture* picture) { delete picture; }

void edgeprune_generation_options_init(edgeprune_generation_options* options) {
  if (options != nullptr) *options = {sizeof *options, 64, 0, 0, 1, 0, 0, nullptr, 0};
}

edgeprune_status edgeprune_ask(edgeprune_session* session, const edgeprune_picture* const* pictures, size_t num_pictures,
                               const char* prompt, const edgeprune_generation_options* options,
                               edgeprune_piece_callback callback, void* user, edgeprune_answer** answer) {
  clear(answer);
  return guarded([&] {
    require(session, "session");
    require(prompt, "prompt");
    require(answer, "answer");
    if (num_pictures > 0) require(pictures, "pictures");
    std::vector<edgeprune::Picture> read;
    for (size_t index = 0; index < num_pictures; ++index) {
      require(pictures[index], "a picture");
      read.push_back(pictures[index]->picture);
    }
    edgeprune::PieceCallback pass_on;
    if (callback != nullptr) {
      pass_on = [&](std::string_view piece) {
        const std::string ended(piece);
        return callback(ended.c_str(), ended.size(), user) == 0;
      };
    }
    *answer = new edgeprune_answer(session->session.answer(read, prompt, sampling_options(options), pass_on));
  });
}

void edgeprune_answer_release(edgeprune_answer* answer) { delete answer; }

const char* edgeprune_answer_text(const edgeprune_answer* answer) { return answer != nullptr ? answer->answer.text.c_str() : ""; }

const char* edgeprune_answer_finish_reason(const edgeprune_answer* answer) {
  return answer != nullptr ? answer->answer.finish_reason.c_str() : "";
}

const int64_t* edgeprune_answer_token_ids(const edgeprune_answer* answer, size_t* count) {
  if (count != nullptr) *count = answer != nullptr ? answer->answer.token_ids.size() : 0;
  return answer != nullptr ? answer->answer.token_ids.data() : nullptr;
}

int64_t edgeprune_answer_prompt_tokens(const edgeprune_answer* answer) {
  return answer != nullptr ? answer->answer.prompt_tokens : 0;
}

int64_t edgeprune_answer_decode_steps(const edgeprune_answer* answer) {
  return answer != nullptr ? answer->answer.decode_steps : 0;
}

const char* edgeprune_answer_json(const edgeprune_answer* answer) { return answer != nullptr ? answer->json.c_str() : "{}"; }

double edgeprune_answer_timing_ms(const edgeprune_answer* answer, const char* name) {
  if (answer == nullptr || name == nullptr) return 0;
  for (const auto& [known, milliseconds] : answer->answer.timings_ms) {
    if (known == name) return milliseconds;
  }
  return 0;
}

size_t edgeprune_answer_num_timings(const edgeprune_answer* answer) {
  return answer != nullptr ? answer->answer.timings_ms.size() : 0;
}

edgeprune_status edgeprune_answer_timing(const edgeprune_answer* answer, size_t index, const char** name, double* milliseconds) {
  return guarded([&] {
    require(answer, "answer");
    if (index >= answer->answer.timings_ms.size()) throw edgeprune::ArgumentError("there is no timing of that index");
    const auto& [known, value] = answer->answer.timings_ms[index];
    if (name != nullptr) *name = known.c_str();
    if (milliseconds != nullptr) *milliseconds = value;
  });
}

size_t edgeprune_answer_num_sites(const edgeprune_answer* answer) { return answer != nullptr ? answer->answer.sites.size() : 0; }

edgeprune_status edgeprune_answer_site(const edgeprune_answer* answer, size_t index, edgeprune_site* site) {
  return guarded([&] {
    require(answer, "answer");
    require(site, "site");
    if (index >= answer->answer.sites.size()) throw edgeprune::ArgumentError("there is no site of that index");
    const edgeprune::SiteReport& report = answer->answer.sites[index];
    const std::vector<int64_t>& evictions = answer->evictions[index];
    const edgeprune_site whole = {site->struct_size,     report.name.c_str(),   report.place.c_str(),
                                  report.tokens_in,      report.kept,           report.indices.data(),
                                  report.indices.size(), evictions.data(),      evictions.size() / 2};
    if (site->struct_size < sizeof(size_t)) throw edgeprune::ArgumentError("struct_size of the site is not set");
    std::memcpy(site, &whole, std::min(site->struct_size, sizeof whole));
  });
}
