/* The header is C, and wrong arguments are refused. */
#include <stdio.h>
#include <string.h>

#include "edgeprune/edgeprune.h"

#define CHECK(condition)                                         \
  if (!(condition)) {                                            \
    fprintf(stderr, "line %d: " #condition "\n", __LINE__);      \
    return 1;                                                    \
  }

int main(void) {
  edgeprune_session* session = (edgeprune_session*)&session;
  edgeprune_picture* picture = NULL;
  edgeprune_answer* answer = NULL;
  edgeprune_session_options options;
  const uint8_t pixels[12] = {0};
  int64_t width = -1, height = -1;

  CHECK(edgeprune_abi_version() == EDGEPRUNE_ABI_VERSION);
  CHECK(strlen(edgeprune_version()) > 0);
  CHECK(edgeprune_session_open("/nowhere", NULL, &session) == EDGEPRUNE_ERROR_BUNDLE);
  CHECK(session == NULL);
  CHECK(strstr(edgeprune_last_error(), "is not a folder") != NULL);
  CHECK(edgeprune_session_open(NULL, NULL, &session) == EDGEPRUNE_ERROR_ARGUMENT);
  CHECK(edgeprune_session_open("/nowhere", NULL, NULL) == EDGEPRUNE_ERROR_ARGUMENT);
  edgeprune_session_options_init(&options);
  options.struct_size = 0;
  CHECK(edgeprune_session_open("/nowhere", &options, &session) == EDGEPRUNE_ERROR_ARGUMENT);
  CHECK(edgeprune_ask(NULL, NULL, 0, "?", NULL, NULL, NULL, &answer) == EDGEPRUNE_ERROR_ARGUMENT);

  CHECK(edgeprune_picture_read("/nowhere.png", &picture) == EDGEPRUNE_ERROR_PICTURE);
  CHECK(edgeprune_picture_from_pixels(pixels, 2, 2, 2, 4, &picture) == EDGEPRUNE_ERROR_PICTURE);
  CHECK(edgeprune_picture_from_pixels(pixels, 2, 2, 3, 5, &picture) == EDGEPRUNE_ERROR_PICTURE);
  CHECK(edgeprune_picture_from_pixels(pixels, 0, 2, 3, 6, &picture) == EDGEPRUNE_ERROR_PICTURE);
  CHECK(edgeprune_picture_from_pixels(pixels, 1LL << 40, 1LL << 40, 3, 1LL << 42, &picture) == EDGEPRUNE_ERROR_PICTURE);
  CHECK(picture == NULL);
  CHECK(edgeprune_picture_from_pixels(pixels, 2, 2, 3, 6, &picture) == EDGEPRUNE_OK);
  edgeprune_picture_size(picture, &width, &height);
  CHECK(width == 2 && height == 2);
  edgeprune_picture_release(picture);

  edgeprune_picture_release(NULL);
  edgeprune_answer_release(NULL);
  edgeprune_session_close(NULL);
  CHECK(strcmp(edgeprune_answer_text(NULL), "") == 0);
  CHECK(edgeprune_answer_num_sites(NULL) == 0);
  return 0;
}
