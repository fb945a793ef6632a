// Executes the kernel sources on the host, thread by thread: what CUDA gives them, in plain C++.
//
// Every thread of a block is a coroutine that runs until it meets a barrier or a warp operation, and goes on when all
// that must take part have come. It shows what can be shown without a GPU: indices, tiles, masks, ranks, barriers that
// are missing (a warp, chosen at random, runs as far ahead as it can) or that not all threads reach, copies that are not
// waited for or overwrite what is still read (each happens at once or at the last moment), writes behind the end of
// shared memory. It shows neither every race nor anything about speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <type_traits>
#include <vector>

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace edgeprune {
namespace emulator {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kMaxSharedBytes = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120, the least of all
constexpr int kGuardBytes = 256;
constexpr unsigned char kPoison = 0xcd;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated kernel: %s\n", what);
  std::abort();
}

struct Slot {
  alignas(16) char bytes[32];
};

// What threads meet at: all of them put down a value, then all of them see all values. Two sets of slots, because
// a thread may come to the next meeting before the others have looked at this one.
struct Meeting {
  int members = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<Slot> slots[2];
};

template <typename T>
class Values {
 public:
  explicit Values(const std::vector<Slot>& slots) : slots_(&slots) {}
  int size() const { return static_cast<int>(slots_->size()); }
  T operator[](int place) const {
    T value;
    std::memcpy(static_cast<void*>(&value), (*slots_)[place].bytes, sizeof(T));
    return value;
  }

 private:
  const std::vector<Slot>* slots_;
};

struct Copy {
  void* target;
  const void* source;
  bool valid;
};

inline void carry_out(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.target, copy.source, 16);
  } else {
    std::memset(copy.target, 0, 16);
  }
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  int warp, lane;
  bool done = false;
  std::deque<std::vector<Copy>> copies;  // committed groups, the oldest first
  std::vector<Copy> uncommitted;
};

struct Block {
  dim3 grid;
  uint3 index;
  ucontext_t scheduler;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  char* shared = nullptr;
  Thread* running = nullptr;
  bool progress = false;
  std::function<void()> kernel;
};

inline Block*& block() {
  static Block* current = nullptr;
  return current;
}

inline std::mt19937& random_numbers() {
  static std::mt19937 numbers(0);
  return numbers;
}

inline Thread& thread() { return *block()->running; }

inline void yield() { swapcontext(&thread().context, &block()->scheduler); }

inline void leave(Meeting& meeting) {
  --meeting.members;
  if (meeting.arrived != 0) fail("a thread ended while others wait for it");
}

inline void enter() {
  Block& b = *block();
  b.kernel();
  Thread& self = thread();
  self.done = true;
  b.progress = true;
  --b.all.members;
  if (b.all.members > 0 && b.all.arrived == b.all.members) {  // a barrier does not wait for threads that ended
    b.all.arrived = 0;
    ++b.all.generation;
  }
  leave(b.warps[self.warp]);
  swapcontext(&self.context, &b.scheduler);
}

template <typename T>
Values<T> meet(Meeting& meeting, int place, const T& value) {
  static_assert(sizeof(T) <= sizeof(Slot));
  const uint64_t generation = meeting.generation;
  std::vector<Slot>& slots = meeting.slots[generation % 2];
  std::memcpy(slots[place].bytes, &value, sizeof(T));
  block()->progress = true;
  if (++meeting.arrived == meeting.members) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    while (meeting.generation == generation) yield();
  }
  return Values<T>(slots);
}

template <typename T>
Values<T> meet_warp(const T& value) {
  Meeting& meeting = block()->warps[thread().warp];
  if (meeting.members != 32) fail("a warp operation with threads that have ended");
  return meet(meeting, thread().lane, value);
}

template <typename T>
Values<T> meet_block(const T& value) {
  return meet(block()->all, thread().warp * 32 + thread().lane, value);
}

inline void run_block(Block& b, int threads) {
  block() = &b;
  b.threads = std::vector<Thread>(threads);
  b.warps = std::vector<Meeting>(threads / 32);
  for (Meeting& warp : b.warps) {
    warp.members = 32;
    for (auto& slots : warp.slots) slots.resize(32);
  }
  b.all = Meeting();
  b.all.members = threads;
  for (auto& slots : b.all.slots) slots.resize(threads);
  for (int t = 0; t < threads; ++t) {
    Thread& one = b.threads[t];
    one.index = {static_cast<unsigned>(t), 0, 0};
    one.warp = t / 32;
    one.lane = t % 32;
    one.stack.reset(new char[kStackBytes]);
    getcontext(&one.context);
    one.context.uc_stack.ss_sp = one.stack.get();
    one.context.uc_stack.ss_size = kStackBytes;
    one.context.uc_link = nullptr;
    makecontext(&one.context, enter, 0);
  }
  // A warp runs as far ahead of the others as barriers let it: that is where a missing barrier shows.
  std::vector<int> warps(threads / 32), lanes(32);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    std::shuffle(warps.begin(), warps.end(), random_numbers());
    for (const int warp : warps) {
      do {
        b.progress = false;
        std::shuffle(lanes.begin(), lanes.end(), random_numbers());
        for (const int lane : lanes) {
          Thread& one = b.threads[warp * 32 + lane];
          if (one.done) continue;
          b.running = &one;
          swapcontext(&b.scheduler, &one.context);
        }
        moved = moved || b.progress;
      } while (b.progress);
    }
  }
  for (const Thread& one : b.threads) {
    if (!one.done) fail("threads wait for each other: not all reach the same barrier");
  }
  for (Thread& one : b.threads) {
    for (const auto& group : one.copies) {
      if (!group.empty()) fail("a copy was never waited for");
    }
    if (!one.uncommitted.empty()) fail("a copy was never committed");
  }
}

}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  if (grid.y > 65535 || grid.z > 65535 || shared_bytes > emulator::kMaxSharedBytes || threads % 32 != 0) {
    return cudaErrorInvalidValue;
  }
  std::vector<uint4> storage((shared_bytes + emulator::kGuardBytes + 15) / 16);
  emulator::Block block;
  block.grid = grid;
  block.shared = reinterpret_cast<char*>(storage.data());
  std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  block.kernel = [&] { std::apply(kernel, parameters); };
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = {x, y, z};
        std::memset(block.shared, emulator::kPoison, shared_bytes + emulator::kGuardBytes);
        emulator::run_block(block, threads);
        for (int i = 0; i < emulator::kGuardBytes; ++i) {
          if (static_cast<unsigned char>(block.shared[shared_bytes + i]) != emulator::kPoison) {
            emulator::fail("a write behind the end of shared memory");
          }
        }
      }
    }
  }
  return cudaSuccess;
}

inline void copy_async(void* target, const void* source, bool valid) {
  if (reinterpret_cast<uintptr_t>(target) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0)) {
    emulator::fail("an asynchronous copy that is not aligned to 16 bytes");
  }
  // It may happen at any time until it is waited for: here at once, or at the last moment.
  const emulator::Copy copy = {target, source, valid};
  if (emulator::random_numbers()() % 2 == 0) emulator::carry_out(copy);
  else emulator::thread().uncommitted.push_back(copy);
}

inline void copy_async_commit() {
  emulator::thread().copies.push_back(std::move(emulator::thread().uncommitted));
  emulator::thread().uncommitted.clear();
}

template <int Pending>
void copy_async_wait() {
  auto& groups = emulator::thread().copies;
  for (; groups.size() > Pending; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) emulator::carry_out(copy);
  }
}

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulator::fail("a matrix row that is not aligned to 16 bytes");
  const auto rows = emulator::meet_warp(row);
  const int lane = emulator::thread().lane;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(&matrix[i], static_cast<const char*>(rows[i * 8 + lane / 4]) + 4 * (lane % 4), 4);
  }
}

template <typename T>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(static_cast<void*>(mine.a), a, sizeof mine.a);
  std::memcpy(static_cast<void*>(mine.b[0]), &b0, 4);
  std::memcpy(static_cast<void*>(mine.b[1]), &b1, 4);
  const auto operands = emulator::meet_warp(mine);
  const int lane = emulator::thread().lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands left = operands[row % 8 * 4 + k % 8 / 2], right = operands[column * 4 + k % 8 / 2];
      c[i] += static_cast<float>(left.a[row / 8 + k / 8 * 2][k % 2]) * static_cast<float>(right.b[k / 8][k % 2]);
    }
  }
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace edgeprune

#define EDGEPRUNE_SHARED(name) char* name = ::edgeprune::emulator::block()->shared
#define threadIdx (::edgeprune::emulator::thread().index)
#define blockIdx (::edgeprune::emulator::block()->index)
#define gridDim (::edgeprune::emulator::block()->grid)

inline void __syncthreads() { edgeprune::emulator::meet_block(0); }

inline int __syncthreads_or(int value) {
  const auto values = edgeprune::emulator::meet_block(value);
  for (int place = 0; place < values.size(); ++place) {
    if (values[place] != 0) return 1;
  }
  return 0;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto values = edgeprune::emulator::meet_warp(static_cast<int>(value));
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<unsigned>(values[lane]) << lane;
  return votes;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return edgeprune::emulator::meet_warp(value)[lane];
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = edgeprune::emulator::thread().lane;
  return edgeprune::emulator::meet_warp(value)[lane ^ mask];
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = edgeprune::emulator::thread().lane;
  return edgeprune::emulator::meet_warp(value)[lane < step ? lane : lane - step];
}

template <typename T>
T __reduce_add_sync(unsigned, T value) {
  const auto values = edgeprune::emulator::meet_warp(value);
  T sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += values[lane];
  return sum;
}

template <typename T>
T __reduce_max_sync(unsigned, T value) {
  const auto values = edgeprune::emulator::meet_warp(value);
  for (int lane = 0; lane < 32; ++lane) value = std::max(value, values[lane]);
  return value;
}

template <typename T>
T __reduce_min_sync(unsigned, T value) {
  const auto values = edgeprune::emulator::meet_warp(value);
  for (int lane = 0; lane < 32; ++lane) value = std::min(value, values[lane]);
  return value;
}

inline int atomicAdd(int* counter, int value) {
  const int old = *counter;
  *counter += value;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) edgeprune::emulator::fail("a read that is not aligned");
  return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
using std::isnan;
using std::max;
using std::min;
