/* libedgeprune: opens a bundle, takes pictures and a question, streams the answer. The C ABI.
 *
 * Rules that hold for every function:
 * - Handles are opaque. Whoever gets one by an out parameter owns it and gives it to the function that releases it;
 *   releasing NULL does nothing. Nothing that a function takes is kept after it returns, unless it says so.
 * - A function that can fail returns a status. Everything but EDGEPRUNE_OK leaves out parameters at NULL, and
 *   edgeprune_last_error() holds one line: the cause, then what mends it.
 * - No exception leaves the library. Texts are UTF-8 and end with a zero byte.
 * - A session may be used by several threads at once; pictures and answers may be read by several at once.
 * - Structs begin with struct_size: fields are only ever added behind the others. Fill them with the function that
 *   sets the defaults.
 */
#ifndef EDGEPRUNE_EDGEPRUNE_H
#define EDGEPRUNE_EDGEPRUNE_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define EDGEPRUNE_API __attribute__((visibility("default")))
#else
#define EDGEPRUNE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when a function or field is added; the library's soname changes when one changes. */
#define EDGEPRUNE_ABI_VERSION 1

typedef enum edgeprune_status {
  EDGEPRUNE_OK = 0,
  EDGEPRUNE_ERROR_ARGUMENT = 1, /* a null pointer, an index out of range */
  EDGEPRUNE_ERROR_BUNDLE = 2,   /* the bundle is missing, damaged or of another format */
  EDGEPRUNE_ERROR_PICTURE = 3,  /* a picture is unusable */
  EDGEPRUNE_ERROR_PROMPT = 4,   /* the prompt cannot be answered, an option is out of range */
  EDGEPRUNE_ERROR_BACKEND = 5,  /* ONNX Runtime or TensorRT is missing, or cannot run a graph here */
  EDGEPRUNE_ERROR_MEMORY = 6,   /* no memory */
  EDGEPRUNE_ERROR_INTERNAL = 7, /* a bug */
  EDGEPRUNE_ERROR_PRUNING = 8   /* a pruner failed, keeps what is not there, or has no site in the bundle */
} edgeprune_status;

typedef struct edgeprune_session edgeprune_session;
typedef struct edgeprune_picture edgeprune_picture;
typedef struct edgeprune_answer edgeprune_answer;

/* The version of the library, and the EDGEPRUNE_ABI_VERSION that it was built with. */
EDGEPRUNE_API const char* edgeprune_version(void);
EDGEPRUNE_API int32_t edgeprune_abi_version(void);

/* What went wrong in the last call of this thread that failed. Valid until this thread's next call; never NULL. */
EDGEPRUNE_API const char* edgeprune_last_error(void);

/* ---- pruners ---- */

/* The visual tokens that have reached a pruning site, in the order of the prompt. All of it is valid during the call. */
typedef struct edgeprune_site_scores {
  size_t struct_size;
  const char* name;          /* "site0" … */
  const char* place;         /* in words */
  int64_t layer;             /* the decoder layer that it lies before, or inside of, 0-based */
  int64_t num_tokens;        /* N */
  const float* scores;       /* [N]: the higher, the more important */
  const int64_t* slots;      /* [N]: which tokens they are, as edgeprune_site.indices names them */
  const int64_t* places;     /* [N, 6]: picture, grid, row, column, rows and columns of that grid */
  const int64_t* own_choice; /* the indices (0 to N-1) that the bundle itself would keep, ascending */
  int64_t num_own_choice;
  double elapsed_ms;         /* since the answer began */
} edgeprune_site_scores;

/* Chooses the visual tokens that stay behind a site, in the place of the bundle: writes their indices (0 to N-1, each
 * once, in any order) to `keep`, which has room for N, and returns how many, at least 1. Text always stays. Anything
 * negative, such as EDGEPRUNE_PRUNER_FAILED, ends the answer with EDGEPRUNE_ERROR_PRUNING; so does a choice that is none.
 * It is called on the thread that asked, by several threads at once where they share a session, and must not throw. */
typedef int64_t (*edgeprune_pruner)(const edgeprune_site_scores* site, int64_t* keep, void* user);

#define EDGEPRUNE_PRUNER_FAILED (-1)

/* Writes the indices of the `count` highest of `num_tokens` scores (at least 1, at most all of them) to `keep`, ascending,
 * and returns how many: what a pruner may return. Equals go to the lower index, NaN is the lowest, as in the graphs. */
EDGEPRUNE_API int64_t edgeprune_keep_highest(const float* scores, int64_t num_tokens, int64_t count, int64_t* keep);

/* ---- sessions ---- */

typedef struct edgeprune_session_options {
  size_t struct_size;
  const char* backend;         /* "onnxruntime", or "tensorrt" with the engines that the bundle holds */
  const char* provider;        /* of ONNX Runtime: "cpu" or "cuda" */
  int32_t threads;             /* of an operator in ONNX Runtime; 0 lets it choose */
  const char* runtime_library; /* the backend's library; NULL looks at EDGEPRUNE_ONNXRUNTIME or EDGEPRUNE_TENSORRT, then
                                  where the linker looks */
  edgeprune_pruner pruner;     /* chooses at the sites that give their scores (method "host"); NULL leaves it to the bundle */
  void* pruner_user;           /* handed to it; both are kept until the session is closed */
} edgeprune_session_options;

EDGEPRUNE_API void edgeprune_session_options_init(edgeprune_session_options* options);

/* Opens a bundle. `options` may be NULL. The caller owns *session: edgeprune_session_close. */
EDGEPRUNE_API edgeprune_status edgeprune_session_open(const char* bundle, const edgeprune_session_options* options,
                                                      edgeprune_session** session);
/* No call on the session may be running. */
EDGEPRUNE_API void edgeprune_session_close(edgeprune_session* session);

/* ---- pictures ---- */

/* Each copies what it needs. The caller owns *picture: edgeprune_picture_release. */
EDGEPRUNE_API edgeprune_status edgeprune_picture_read(const char* path, edgeprune_picture** picture);
EDGEPRUNE_API edgeprune_status edgeprune_picture_decode(const uint8_t* file, size_t size, edgeprune_picture** picture);
/* 8-bit pixels [height, width, channels]: 1 (grey), 3 (RGB) or 4 (RGBA, what is transparent becomes white); rows are
 * `stride` bytes apart. */
EDGEPRUNE_API edgeprune_status edgeprune_picture_from_pixels(const uint8_t* pixels, int64_t width, int64_t height,
                                                             int64_t channels, int64_t stride, edgeprune_picture** picture);
EDGEPRUNE_API void edgeprune_picture_size(const edgeprune_picture* picture, int64_t* width, int64_t* height);
EDGEPRUNE_API void edgeprune_picture_release(edgeprune_picture* picture);

/* ---- answers ---- */

typedef struct edgeprune_generation_options {
  size_t struct_size;
  int64_t max_new_tokens; /* most tokens to generate */
  double temperature;     /* 0 takes the most likely token */
  int64_t top_k;          /* draw from the k most likely tokens; 0 = all */
  double top_p;           /* draw from the smallest set with this probability */
  int32_t has_seed;       /* 0 draws differently each time */
  uint64_t seed;
  const char* const* stop; /* texts that end the answer */
  size_t num_stop;
  int32_t ignore_eos; /* 1 goes on behind the model's end token, so that answers of one length can be timed */
} edgeprune_generation_options;

EDGEPRUNE_API void edgeprune_generation_options_init(edgeprune_generation_options* options);

/* Takes a piece of the answer as it comes: `size` bytes of whole characters, followed by a zero byte, valid during the
 * call. Returns 0 to go on; anything else ends the answer there, with the finish reason "cancelled". It is called on the
 * thread that asked and must not throw. */
typedef int32_t (*edgeprune_piece_callback)(const char* piece, size_t size, void* user);

/* Answers a question about `num_pictures` pictures, in the order of the prompt's placeholders; without placeholders they
 * come before the text. `options` and `callback` may be NULL. The caller owns *answer: edgeprune_answer_release; it does
 * not need the session any more. */
EDGEPRUNE_API edgeprune_status edgeprune_ask(edgeprune_session* session, const edgeprune_picture* const* pictures,
                                             size_t num_pictures, const char* prompt,
                                             const edgeprune_generation_options* options, edgeprune_piece_callback callback,
                                             void* user, edgeprune_answer** answer);
EDGEPRUNE_API void edgeprune_answer_release(edgeprune_answer* answer);

/* What follows belongs to the answer. */
EDGEPRUNE_API const char* edgeprune_answer_text(const edgeprune_answer* answer);
/* "end" (the model ended), "stop" (a stop text), "length" (max_new_tokens) or "cancelled". */
EDGEPRUNE_API const char* edgeprune_answer_finish_reason(const edgeprune_answer* answer);
EDGEPRUNE_API const int64_t* edgeprune_answer_token_ids(const edgeprune_answer* answer, size_t* count);
EDGEPRUNE_API int64_t edgeprune_answer_prompt_tokens(const edgeprune_answer* answer);
EDGEPRUNE_API int64_t edgeprune_answer_decode_steps(const edgeprune_answer* answer);
/* All of it, as edgeprune run --json prints it. */
EDGEPRUNE_API const char* edgeprune_answer_json(const edgeprune_answer* answer);

/* A stage's milliseconds by its name, such as "time_to_first_token", "decode", "total"; 0 where it did not run. */
EDGEPRUNE_API double edgeprune_answer_timing_ms(const edgeprune_answer* answer, const char* name);
EDGEPRUNE_API size_t edgeprune_answer_num_timings(const edgeprune_answer* answer);
EDGEPRUNE_API edgeprune_status edgeprune_answer_timing(const edgeprune_answer* answer, size_t index, const char** name,
                                                       double* milliseconds);

/* What a pruning site did. */
typedef struct edgeprune_site {
  size_t struct_size;
  const char* name;         /* "site0" … */
  const char* place;        /* in words */
  int64_t tokens_in;        /* visual tokens that entered it */
  int64_t kept;             /* visual tokens that left it */
  const int64_t* indices;   /* slots of the kept tokens, ascending: picture · patches + row-major patch, where a picture is one tile */
  size_t num_indices;
  const int64_t* evictions; /* pairs: generated tokens, visual tokens left after them */
  size_t num_evictions;
} edgeprune_site;

EDGEPRUNE_API size_t edgeprune_answer_num_sites(const edgeprune_answer* answer);
/* `site->struct_size` must be set. What the fields point to belongs to the answer. */
EDGEPRUNE_API edgeprune_status edgeprune_answer_site(const edgeprune_answer* answer, size_t index, edgeprune_site* site);

#ifdef __cplusplus
}
#endif

#endif
