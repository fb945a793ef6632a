#include "backend.h"

#include "error.h"
#include "onnxruntime/onnxruntime_backend.h"
#include "tensorrt/tensorrt_backend.h"

namespace edgeprune {

std::unique_ptr<Backend> open_backend(const BackendOptions& options) {
  if (options.backend == "onnxruntime") return open_onnxruntime(options);
  if (options.backend != "tensorrt") {
    throw BackendError("backend '" + options.backend + "' is unknown, known: onnxruntime, tensorrt");
  }
  if (options.provider != "cpu" || options.threads != 0) {
    throw BackendError(std::string(options.provider != "cpu" ? "--provider" : "--threads") +
                       " is of ONNX Runtime: leave it away, or run with --backend onnxruntime");
  }
  return open_tensorrt(options);
}

}  // namespace edgeprune
