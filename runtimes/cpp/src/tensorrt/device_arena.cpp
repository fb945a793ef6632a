#include "tensorrt/device_arena.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace edgeprune {
namespace {

// Blocks of an octave: tensors of nearly equal size share blocks, at most an eighth of which is unused.
constexpr size_t kSteps = 8;

size_t power_of_two_from(size_t size) {
  size_t power = 1;
  while (power < size) power *= 2;
  return power;
}

}  // namespace

size_t block_bytes(size_t size) {
  const size_t step = std::max(kDeviceAlignment, power_of_two_from(size) / (2 * kSteps));
  return std::max(step, (size + step - 1) / step * step);
}

std::shared_ptr<void> MemoryPool::allocate(size_t size) {
  size = block_bytes(size);
  void* address = nullptr;
  {
    const std::lock_guard<std::mutex> lock(using_);
    std::vector<void*>& unused = unused_[size];
    if (!unused.empty()) {
      address = unused.back();
      unused.pop_back();
    } else {
      address = malloc_(size);
    }
  }
  if (address == nullptr) {
    // What is unused in other sizes may be enough.
    free_unused();
    address = malloc_(size);
  }
  if (address == nullptr) {
    throw BackendError("the GPU has no " + std::to_string(std::max<size_t>(1, size >> 20)) +
                       " MiB left: close other programs that use it, ask for fewer new tokens or smaller pictures, or build "
                       "the bundle with a lower --max-sequence");
  }
  return {address, [pool = shared_from_this(), size](void* block) { pool->give_back(block, size); }};
}

void MemoryPool::give_back(void* address, size_t size) noexcept {
  const std::lock_guard<std::mutex> lock(using_);
  try {
    unused_[size].push_back(address);
  } catch (...) {
    free_(address);  // no memory on the host to remember it
  }
}

void MemoryPool::free_unused() {
  const std::lock_guard<std::mutex> lock(using_);
  for (auto& [size, addresses] : unused_) {
    for (void* address : addresses) free_(address);
    addresses.clear();
  }
}

void Arena::reserve(size_t size) { needed_ = std::max(needed_, block_bytes(size)); }

const std::shared_ptr<void>& Arena::block() {
  if (block_ == nullptr || size_ < needed_) {
    block_ = nullptr;
    block_ = pool_->allocate(needed_);
    size_ = needed_;
  }
  return block_;
}

}  // namespace edgeprune
