// TensorRT: the engines that `edgeprune build` put into a bundle, on the first GPU.
#pragma once

#include <memory>

#include "backend.h"

namespace edgeprune {

// Throws BackendError: there is no GPU or no TensorRT, or this library was built without its headers.
std::unique_ptr<Backend> open_tensorrt(const BackendOptions& options);

}  // namespace edgeprune
