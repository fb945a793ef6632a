// Resizing as Pillow 13 does it: a separable filter, its weights in fixed point, 8 bits between the passes.
#pragma once

#include <optional>
#include <string>

#include "pictures/picture.h"

namespace edgeprune {

enum class Resampling { nearest, lanczos, bilinear, bicubic, box, hamming };

std::optional<Resampling> resampling(const std::string& name);
// "nearest, lanczos, …"
std::string known_resamplings();

// Throws PictureError: the result would be too large.
Picture resized(const Picture& picture, int64_t width, int64_t height, Resampling resampling);

}  // namespace edgeprune
