#include "tensorrt/cuda_device.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace edgeprune {
namespace {

// What a download begins with: more than one integer and less than a vocabulary; it grows to what is read.
constexpr size_t kStagingBytes = 1 << 16;

cuda::Pointer pointer(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

CudaDevice::CudaDevice() : driver_(std::make_shared<cuda::Driver>()) {
  const cuda::Driver::Current current(*driver_);
  driver_->check(driver_->stream_create(&stream_, cuda::kNonBlocking));
  memory_ = std::make_shared<MemoryPool>(
      [driver = driver_](size_t size) -> void* {
        const cuda::Driver::Current current(*driver);
        cuda::Pointer made = 0;
        const int result = driver->allocate(&made, size);
        if (result == cuda::kOutOfMemory) return nullptr;
        driver->check(result);
        return reinterpret_cast<void*>(static_cast<uintptr_t>(made));
      },
      [driver = driver_](void* address) {
        const cuda::Driver::Current current(*driver);
        driver->free(pointer(address));
      });
}

CudaDevice::~CudaDevice() {
  const cuda::Driver::Current current(*driver_);
  driver_->stream_synchronize(stream_);
  if (staging_ != nullptr) driver_->free_host(staging_);
  driver_->stream_destroy(stream_);
}

Tensor CudaDevice::allocate(Shape shape, DataType type) {
  std::shared_ptr<void> block = memory_->allocate(static_cast<size_t>(element_count(shape)) * element_bytes(type));
  void* address = block.get();
  return {address, std::move(shape), type, Memory::device, std::move(block)};
}

Tensor CudaDevice::upload(const Tensor& tensor) {
  Tensor made = allocate(tensor.shape, tensor.type);
  if (tensor.bytes() == 0) return made;
  const cuda::Driver::Current current(*driver_);
  // From pageable memory: the driver has taken the bytes when this returns.
  driver_->check(driver_->copy_to_device(pointer(made.address), tensor.address, tensor.bytes(), stream_));
  return made;
}

Tensor CudaDevice::download(const Tensor& tensor) {
  Tensor host = host_tensor(tensor.shape, tensor.type);
  const size_t size = tensor.bytes();
  const cuda::Driver::Current current(*driver_);
  const std::lock_guard<std::mutex> lock(reading_);
  if (staging_bytes_ < size) {
    if (staging_ != nullptr) driver_->check(driver_->free_host(staging_));
    staging_ = nullptr;
    staging_bytes_ = 0;
    const size_t larger = std::max(size, kStagingBytes);
    driver_->check(driver_->allocate_host(&staging_, larger));
    staging_bytes_ = larger;
  }
  if (size > 0) driver_->check(driver_->copy_to_host(staging_, pointer(tensor.address), size, stream_));
  driver_->check(driver_->stream_synchronize(stream_));
  if (size > 0) std::memcpy(host.address, staging_, size);
  return host;
}

void CudaDevice::synchronize() {
  const cuda::Driver::Current current(*driver_);
  driver_->check(driver_->stream_synchronize(stream_));
}

}  // namespace edgeprune
