// Memory and one stream of the first NVIDIA GPU, and copies between it and the host.
#pragma once

#include <memory>
#include <mutex>

#include "tensor.h"
#include "tensorrt/cuda_driver.h"
#include "tensorrt/device_arena.h"
#include "tensorrt/upload_staging.h"

namespace edgeprune {

// Everything runs on one stream: memory that is given back may be taken again at once, because whatever uses it next
// comes later on the stream. For several threads.
class CudaDevice {
 public:
  // Throws BackendError: there is no GPU, or its driver is too old.
  CudaDevice();
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  const cuda::Driver& driver() const { return *driver_; }
  cuda::Stream stream() const { return stream_; }
  const std::shared_ptr<MemoryPool>& memory() const { return memory_; }

  // All of these throw BackendError.
  Tensor allocate(Shape shape, DataType type);
  // A copy of a tensor in host memory, which may change when this returns. The copy goes through page-locked memory: from
  // other memory CUDA may wait for the stream, and does not say when it has read it. What is larger than that memory, as a
  // prompt's many tiles, is waited for.
  Tensor upload(const Tensor& tensor);
  // A tensor of the device in host memory; waits for what writes it. The copy goes through page-locked memory, so that it
  // does not hold up what other threads put on the stream.
  Tensor download(const Tensor& tensor);
  void synchronize();

 private:
  std::shared_ptr<cuda::Driver> driver_;
  cuda::Stream stream_ = nullptr;
  std::shared_ptr<MemoryPool> memory_;
  std::mutex reading_;
  void* read_buffer_ = nullptr;
  size_t read_bytes_ = 0;
  // Again by the thread that has it, because an upload may have to wait for the stream.
  std::recursive_mutex uploading_;
  UploadStaging staging_;
  void* upload_buffer_ = nullptr;
};

}  // namespace edgeprune
