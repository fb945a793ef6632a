#include "tensorrt/cuda_driver.h"

#include <dlfcn.h>

#include <cstring>

#include "error.h"

namespace edgeprune::cuda {
namespace {

template <typename Function>
void find(void* library, const char* name, Function& function) {
  const void* address = dlsym(library, name);
  if (address == nullptr) {
    throw BackendError(std::string("the NVIDIA driver lacks ") + name + ": update it, or run with --backend onnxruntime");
  }
  static_assert(sizeof function == sizeof address);
  std::memcpy(&function, &address, sizeof function);
}

}  // namespace

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    throw BackendError("this machine has no NVIDIA GPU with a driver, which TensorRT needs: run with --backend onnxruntime");
  }
#define EDGEPRUNE_CUDA_FIND(name, symbol, arguments) find(library, #symbol, name);
  EDGEPRUNE_CUDA_FUNCTIONS(EDGEPRUNE_CUDA_FIND)
#undef EDGEPRUNE_CUDA_FIND
  const auto opened = [&](int result) {
    if (result == kSuccess) return;
    throw BackendError("CUDA cannot use a GPU here (" + text(result) +
                       "): update the NVIDIA driver, or run with --backend onnxruntime");
  };
  opened(init(0));
  opened(device_get(&device_, 0));
  int major = 0, minor = 0;
  opened(device_attribute(&major, kComputeCapabilityMajor, device_));
  opened(device_attribute(&minor, kComputeCapabilityMinor, device_));
  sm_ = 10 * major + minor;
  opened(retain_context(&context_, device_));
}

Driver::~Driver() { release_context(device_); }

std::string Driver::text(int result) const {
  const char* said = nullptr;
  const bool known = error_string(result, &said) == kSuccess && said != nullptr;
  return known ? said : "error " + std::to_string(result);
}

void Driver::check(int result) const {
  if (result == kSuccess) return;
  throw BackendError("CUDA failed (" + text(result) +
                     "): what ran before on the GPU may have caused it; open the bundle again, and if it fails again build its "
                     "engines again");
}

}  // namespace edgeprune::cuda
