// The part of CUDA's driver API that is called, from libcuda.so.1, which comes with the driver; nothing of CUDA is needed
// to compile this. Source: CUDA driver API, cuda.h of 12.6; the versioned names are those that cuda.h maps to.
#pragma once

#include <cstddef>
#include <string>

// Of the global namespace, as in TensorRT's and CUDA's headers.
struct CUctx_st;
struct CUstream_st;

namespace edgeprune::cuda {

using Device = int;
using Pointer = unsigned long long;
using Context = CUctx_st*;
using Stream = CUstream_st*;

constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 2;            // CUDA_ERROR_OUT_OF_MEMORY
constexpr unsigned kNonBlocking = 1;       // CU_STREAM_NON_BLOCKING
constexpr int kComputeCapabilityMajor = 75;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kComputeCapabilityMinor = 76;

// name here, name in the library, arguments; all return a CUresult
#define EDGEPRUNE_CUDA_FUNCTIONS(F)                                             \
  F(init, cuInit, (unsigned))                                                   \
  F(error_string, cuGetErrorString, (int, const char**))                        \
  F(device_get, cuDeviceGet, (Device*, int))                                    \
  F(device_attribute, cuDeviceGetAttribute, (int*, int, Device))                \
  F(retain_context, cuDevicePrimaryCtxRetain, (Context*, Device))               \
  F(release_context, cuDevicePrimaryCtxRelease_v2, (Device))                    \
  F(push_context, cuCtxPushCurrent_v2, (Context))                               \
  F(pop_context, cuCtxPopCurrent_v2, (Context*))                                \
  F(stream_create, cuStreamCreate, (Stream*, unsigned))                         \
  F(stream_destroy, cuStreamDestroy_v2, (Stream))                               \
  F(stream_synchronize, cuStreamSynchronize, (Stream))                          \
  F(allocate, cuMemAlloc_v2, (Pointer*, size_t))                                \
  F(free, cuMemFree_v2, (Pointer))                                              \
  F(allocate_host, cuMemAllocHost_v2, (void**, size_t))                         \
  F(free_host, cuMemFreeHost, (void*))                                          \
  F(copy_to_device, cuMemcpyHtoDAsync_v2, (Pointer, const void*, size_t, Stream)) \
  F(copy_to_host, cuMemcpyDtoHAsync_v2, (void*, Pointer, size_t, Stream))

// The first GPU's primary context, which TensorRT works in, too. Opened once and never closed: the driver is not made for
// being unloaded.
class Driver {
 public:
  // Throws BackendError: there is no driver or no GPU.
  Driver();
  ~Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

#define EDGEPRUNE_CUDA_DECLARE(name, symbol, arguments) int(*name) arguments = nullptr;
  EDGEPRUNE_CUDA_FUNCTIONS(EDGEPRUNE_CUDA_DECLARE)
#undef EDGEPRUNE_CUDA_DECLARE

  int sm() const { return sm_; }
  // Throws BackendError: a call has failed.
  void check(int result) const;

  // Makes the GPU the calling thread's, and its former one again at the end. Where that fails, the next call says it.
  class Current {
   public:
    explicit Current(const Driver& driver) : driver_(driver), pushed_(driver.push_context(driver.context_) == kSuccess) {}
    ~Current() {
      Context former = nullptr;
      if (pushed_) driver_.pop_context(&former);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Driver& driver_;
    bool pushed_;
  };

 private:
  std::string text(int result) const;

  Device device_ = 0;
  Context context_ = nullptr;
  int sm_ = 0;
};

}  // namespace edgeprune::cuda
