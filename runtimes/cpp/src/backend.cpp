#include "backend.h"

#include "error.h"
#include "onnxruntime/onnxruntime_backend.h"

namespace edgeprune {

std::unique_ptr<Backend> open_backend(const BackendOptions& options) {
  if (options.backend != "onnxruntime") {
    throw BackendError("backend '" + options.backend + "' is unknown, known: onnxruntime");
  }
  return open_onnxruntime(options);
}

}  // namespace edgeprune
