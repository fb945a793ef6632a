#include "onnxruntime/device_copy.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "error.h"

namespace edgeprune {
namespace {

constexpr int kDeviceToHost = 2;  // cudaMemcpyDeviceToHost

void* open_cuda_runtime() {
  for (const char* name : {"libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so"}) {
    if (void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return library;
  }
  throw BackendError("the CUDA runtime (libcudart) was not found: install it, or run with the provider cpu");
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  const void* address = dlsym(library, name);
  if (address == nullptr) throw BackendError(std::string("the CUDA runtime lacks ") + name + ": install another version");
  std::memcpy(&function, &address, sizeof function);
}

}  // namespace

DeviceCopy::DeviceCopy() {
  void* library = open_cuda_runtime();
  find(library, "cudaMalloc", malloc_);
  find(library, "cudaFree", free_);
  find(library, "cudaMemcpy", copy_);
}

Tensor DeviceCopy::allocate(Shape shape, DataType type) const {
  const size_t bytes = static_cast<size_t>(std::max<int64_t>(element_count(shape), 1)) * element_bytes(type);
  void* address = nullptr;
  if (malloc_(&address, bytes) != 0) {
    throw BackendError("the GPU has no " + std::to_string(bytes) + " bytes left: lower max_new_tokens or give fewer pictures");
  }
  const auto release = free_;
  return {address, std::move(shape), type, Memory::device, {address, [release](void* memory) { release(memory); }}};
}

Tensor DeviceCopy::download(const Tensor& tensor) const {
  Tensor host = host_tensor(tensor.shape, tensor.type);
  if (tensor.bytes() > 0 && copy_(host.address, tensor.address, tensor.bytes(), kDeviceToHost) != 0) {
    throw BackendError("a tensor cannot be read from the GPU: check the driver, or run with the provider cpu");
  }
  return host;
}

}  // namespace edgeprune
