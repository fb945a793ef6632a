#include "tensorrt/cuda_device.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace edgeprune {
namespace {

// What a download begins with: more than one integer and less than a vocabulary; it grows to what is read.
constexpr size_t kReadBytes = 1 << 16;
// Page-locked memory for uploads: a picture of 336 x 336 pixels and the index tensors of several prompts.
constexpr size_t kUploadBytes = 4 << 20;

cuda::Pointer pointer(const void* address) { return reinterpret_cast<uintptr_t>(address); }

}  // namespace

CudaDevice::CudaDevice() : driver_(std::make_shared<cuda::Driver>()), staging_(kUploadBytes) {
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
  if (read_buffer_ != nullptr) driver_->free_host(read_buffer_);
  if (upload_buffer_ != nullptr) driver_->free_host(upload_buffer_);
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
  const cuda::Pointer target = pointer(made.address);
  if (tensor.bytes() > staging_.bytes()) {
    driver_->check(driver_->copy_to_device(target, tensor.address, tensor.bytes(), stream_));
    synchronize();
    return made;
  }
  const std::lock_guard<std::recursive_mutex> lock(uploading_);
  if (upload_buffer_ == nullptr) driver_->check(driver_->allocate_host(&upload_buffer_, staging_.bytes()));
  std::optional<size_t> offset = staging_.place(tensor.bytes());
  if (!offset) {
    synchronize();
    offset = staging_.place(tensor.bytes());
  }
  char* staged = static_cast<char*>(upload_buffer_) + offset.value();
  std::memcpy(staged, tensor.address, tensor.bytes());
  driver_->check(driver_->copy_to_device(target, staged, tensor.bytes(), stream_));
  return made;
}

Tensor CudaDevice::download(const Tensor& tensor) {
  Tensor host = host_tensor(tensor.shape, tensor.type);
  const size_t size = tensor.bytes();
  const cuda::Driver::Current current(*driver_);
  const std::lock_guard<std::mutex> lock(reading_);
  if (read_bytes_ < size) {
    if (read_buffer_ != nullptr) driver_->check(driver_->free_host(read_buffer_));
    read_buffer_ = nullptr;
    read_bytes_ = 0;
    const size_t larger = std::max(size, kReadBytes);
    driver_->check(driver_->allocate_host(&read_buffer_, larger));
    read_bytes_ = larger;
  }
  if (size > 0) driver_->check(driver_->copy_to_host(read_buffer_, pointer(tensor.address), size, stream_));
  synchronize();
  if (size > 0) std::memcpy(host.address, read_buffer_, size);
  return host;
}

void CudaDevice::synchronize() {
  const cuda::Driver::Current current(*driver_);
  uint64_t mark = 0;
  {
    const std::lock_guard<std::recursive_mutex> lock(uploading_);
    mark = staging_.mark();
  }
  driver_->check(driver_->stream_synchronize(stream_));
  const std::lock_guard<std::recursive_mutex> lock(uploading_);
  staging_.release(mark);
}

}  // namespace edgeprune
