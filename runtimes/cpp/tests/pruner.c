/* Pruners in C, on a bundle whose first site gives its scores: pruner BUNDLE */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "edgeprune/edgeprune.h"

#define CHECK(condition)                                                                      \
  if (!(condition)) {                                                                         \
    fprintf(stderr, "line %d: " #condition " (%s)\n", __LINE__, edgeprune_last_error());      \
    return 1;                                                                                 \
  }

typedef struct wish {
  int64_t returned; /* what the pruner returns; 0 keeps `highest` instead */
  int64_t highest;
  int calls;
  int64_t tokens;
} wish;

static int64_t prune(const edgeprune_site_scores* site, int64_t* keep, void* user) {
  wish* wanted = user;
  if (site->struct_size != sizeof *site || site->elapsed_ms <= 0) return -99;
  if (strcmp(site->name, "site0") != 0) {
    memcpy(keep, site->own_choice, (size_t)site->num_own_choice * sizeof *keep);
    return site->num_own_choice;
  }
  ++wanted->calls;
  wanted->tokens = site->num_tokens;
  if (wanted->returned != 0) return wanted->returned;
  return edgeprune_keep_highest(site->scores, site->num_tokens, wanted->highest, keep);
}

static edgeprune_status ask(edgeprune_session* session, edgeprune_answer** answer) {
  static const uint8_t pixels[48] = {0, 90, 200, 10};
  edgeprune_picture* picture = NULL;
  const edgeprune_picture* pictures[1];
  edgeprune_status status = edgeprune_picture_from_pixels(pixels, 4, 4, 3, 12, &picture);
  if (status != EDGEPRUNE_OK) return status;
  pictures[0] = picture;
  status = edgeprune_ask(session, pictures, 1, "What is it?", NULL, NULL, NULL, answer);
  edgeprune_picture_release(picture);
  return status;
}

int main(int count, char** values) {
  wish wanted = {0, 5, 0, 0};
  edgeprune_session_options options;
  edgeprune_session* session = NULL;
  edgeprune_answer* answer = NULL;
  edgeprune_site site;
  const float scores[5] = {1, NAN, 3, 1, -INFINITY};
  int64_t keep[5];

  CHECK(edgeprune_keep_highest(scores, 5, 2, keep) == 2 && keep[0] == 0 && keep[1] == 2);
  CHECK(edgeprune_keep_highest(scores, 5, 4, keep) == 4 && keep[3] == 4);
  CHECK(edgeprune_keep_highest(scores, 5, 9, keep) == 5 && keep[1] == 1);
  CHECK(edgeprune_keep_highest(scores, 5, -1, keep) == 1 && keep[0] == 2);
  CHECK(edgeprune_keep_highest(scores, 0, 1, keep) == 0 && edgeprune_keep_highest(NULL, 5, 1, keep) == 0);
  if (count != 2) return 2;

  edgeprune_session_options_init(&options);
  options.threads = 1;
  options.pruner = prune;
  options.pruner_user = &wanted;
  CHECK(edgeprune_session_open(values[1], &options, &session) == EDGEPRUNE_OK);
  CHECK(ask(session, &answer) == EDGEPRUNE_OK);
  site.struct_size = sizeof site;
  CHECK(edgeprune_answer_site(answer, 0, &site) == EDGEPRUNE_OK);
  CHECK(site.kept == 5 && site.tokens_in == wanted.tokens && wanted.calls == 1);
  CHECK(edgeprune_answer_timing_ms(answer, "pruner.site0") > 0);
  edgeprune_answer_release(answer);

  wanted.returned = EDGEPRUNE_PRUNER_FAILED;
  CHECK(ask(session, &answer) == EDGEPRUNE_ERROR_PRUNING);
  CHECK(answer == NULL);
  CHECK(strstr(edgeprune_last_error(), "the pruner failed at site0 (before layer ") != NULL);
  wanted.returned = 1LL << 62;
  CHECK(ask(session, &answer) == EDGEPRUNE_ERROR_PRUNING);
  CHECK(strstr(edgeprune_last_error(), "the pruner keeps 4611686018427387904 of ") != NULL);
  /* A session that failed answers again. */
  wanted.returned = 0;
  wanted.highest = 1;
  CHECK(ask(session, &answer) == EDGEPRUNE_OK);
  edgeprune_answer_release(answer);
  edgeprune_session_close(session);

  /* A program that was compiled before pruners were known passes a shorter struct: what lies behind it is not read. */
  wanted.calls = 0;
  options.struct_size = offsetof(edgeprune_session_options, pruner);
  CHECK(edgeprune_session_open(values[1], &options, &session) == EDGEPRUNE_OK);
  CHECK(ask(session, &answer) == EDGEPRUNE_OK);
  CHECK(wanted.calls == 0);
  edgeprune_answer_release(answer);
  edgeprune_session_close(session);
  return 0;
}
