// ONNX Runtime on the CPU, or on an NVIDIA GPU.
#pragma once

#include <memory>

#include "backend.h"

namespace edgeprune {

// Throws BackendError: no ONNX Runtime, or it lacks the provider.
std::unique_ptr<Backend> open_onnxruntime(const BackendOptions& options);

}  // namespace edgeprune
