// Memory of an NVIDIA GPU through the CUDA runtime that ONNX Runtime's provider has loaded.
#pragma once

#include "tensor.h"

namespace edgeprune {

class DeviceCopy {
 public:
  // Throws BackendError: there is no CUDA runtime.
  DeviceCopy();

  Tensor allocate(Shape shape, DataType type) const;
  Tensor download(const Tensor& tensor) const;

 private:
  int (*malloc_)(void**, size_t) = nullptr;
  int (*free_)(void*) = nullptr;
  int (*copy_)(void*, const void*, size_t, int) = nullptr;
};

}  // namespace edgeprune
