// Stands in for tensorrt_backend.cpp where TensorRT's headers were not found.
#include "error.h"
#include "tensorrt/tensorrt_backend.h"

namespace edgeprune {

std::unique_ptr<Backend> open_tensorrt(const BackendOptions&) {
  throw BackendError(
      "this libedgeprune was built without TensorRT: build it where TensorRT's headers are (NvInferRuntime.h, 10.3 to 11; "
      "-DTENSORRT_ROOT= names their folder), or run with --backend onnxruntime");
}

}  // namespace edgeprune
