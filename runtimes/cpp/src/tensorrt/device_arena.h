// How device memory is divided: blocks that are used again, and one arena for the scratch memory of all engines.
//
// Sizes are plain arithmetic; who allocates and frees is given, so nothing here needs a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace edgeprune {

// TensorRT takes no tensor that begins elsewhere (IExecutionContext::setTensorAddress).
constexpr size_t kDeviceAlignment = 256;

// The size of the block that serves `size` bytes: a multiple of kDeviceAlignment, at most an eighth larger.
size_t block_bytes(size_t size);

// Blocks of device memory that are used again in the order of a stream: a chain needs the same sizes at every token, so
// after the first tokens nothing is allocated any more.
class MemoryPool : public std::enable_shared_from_this<MemoryPool> {
 public:
  // Gives the address of so many bytes, or null where there are none.
  using Malloc = std::function<void*(size_t)>;
  // Frees an address, when nothing on the device uses it any more.
  using Free = std::function<void(void*)>;

  MemoryPool(Malloc malloc, Free free) : malloc_(std::move(malloc)), free_(std::move(free)) {}
  ~MemoryPool() { free_unused(); }
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // A block of at least `size` bytes, at least one of them; it comes back when nothing refers to it any more.
  // Throws BackendError: the device has no memory left.
  std::shared_ptr<void> allocate(size_t size);

 private:
  void free_unused();
  void give_back(void* address, size_t size) noexcept;

  Malloc malloc_;
  Free free_;
  std::mutex using_;
  std::map<size_t, std::vector<void*>> unused_;  // by size
};

// Scratch memory that all execution contexts of a stream share. Not for several threads at once.
class Arena {
 public:
  explicit Arena(std::shared_ptr<MemoryPool> pool) : pool_(std::move(pool)), needed_(block_bytes(0)) {}

  // Another engine needs `size` bytes while it runs.
  void reserve(size_t size);
  // The memory; another one where an engine came that needs more. Throws BackendError.
  const std::shared_ptr<void>& block();
  // Its bytes.
  size_t size() const { return size_; }

 private:
  std::shared_ptr<MemoryPool> pool_;
  size_t needed_;
  size_t size_ = 0;
  std::shared_ptr<void> block_;
};

}  // namespace edgeprune
