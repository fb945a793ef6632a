// libcuda.so.1's double: device memory is host memory that nobody may touch but what runs on the stream.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <vector>

#include "gpu_double.h"

namespace {

constexpr size_t kAlignment = 512;  // cuMemAlloc gives at least 256
constexpr size_t kReserved = size_t{1} << 30;
constexpr int kGarbage = 0xFF;
constexpr int kOutOfMemory = 2, kInvalidValue = 1, kNoDevice = 100, kInvalidContext = 201;

size_t number_of(const char* variable, size_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

struct Gpu {
  std::recursive_mutex working;
  char* memory = static_cast<char*>(mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  std::map<char*, size_t> blocks;
  std::map<char*, size_t> page_locked;
  std::vector<std::function<void()>> pending;
  int retained = 0;
  bool has_stream = false;
  bool pageable = false;  // a copy from memory that is not page-locked waits on the stream

  size_t used() const {
    size_t sum = 0;
    for (const auto& [address, size] : blocks) sum += size;
    return sum;
  }
  void open() { mprotect(memory, kReserved, PROT_READ | PROT_WRITE); }
  void close() { mprotect(memory, kReserved, PROT_NONE); }
  void flush() {
    const std::lock_guard<std::recursive_mutex> lock(working);
    if (pending.empty()) return;
    open();
    for (const std::function<void()>& work : pending) work();
    pending.clear();
    pageable = false;
    close();
  }
};

// Never destroyed: it is used until the process ends.
Gpu& gpu() {
  static auto* one = new Gpu;
  return *one;
}

char context_handle, stream_handle;
thread_local std::vector<void*> current;

bool is_current() { return !current.empty() && current.back() == &context_handle; }

const char* address_of(unsigned long long pointer) { return reinterpret_cast<const char*>(static_cast<uintptr_t>(pointer)); }

bool is_page_locked(const void* address, size_t size) {
  const auto* start = static_cast<const char*>(address);
  for (const auto& [block, bytes] : gpu().page_locked) {
    if (block <= start && start + size <= block + bytes) return true;
  }
  return false;
}

}  // namespace

namespace gpu_double {

void violation(const std::string& what) {
  std::fprintf(stderr, "double: %s\n", what.c_str());
  std::_Exit(86);
}

void note(const std::string& line) {
  const char* path = std::getenv("EDGEPRUNE_DOUBLE_NOTES");
  if (path == nullptr) return;
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  std::ofstream(path, std::ios::app) << line << '\n';
}

void check_stream(const void* stream) {
  demand(is_current(), "no context is current in this thread");
  demand(stream == &stream_handle && gpu().has_stream, "work for another stream");
}

void check_range(const std::string& what, const void* address, size_t size) {
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  const auto* start = static_cast<const char*>(address);
  for (const auto& [block, bytes] : gpu().blocks) {
    if (block <= start && start + size <= block + bytes) return;
  }
  violation(what + ": " + std::to_string(size) + " bytes are not allocated there");
}

bool is_on_device(const void* address) {
  const auto* start = static_cast<const char*>(address);
  return gpu().memory <= start && start < gpu().memory + kReserved;
}

void put_on_stream(std::function<void()> work) {
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  demand(!gpu().pageable, "a copy from memory that is not page-locked was not waited for");
  gpu().pending.push_back(std::move(work));
}

}  // namespace gpu_double

using gpu_double::demand;
using gpu_double::note;

extern "C" {

EDGEPRUNE_DOUBLE int cuInit(unsigned) { return number_of("EDGEPRUNE_DOUBLE_DEVICES", 1) == 0 ? kNoDevice : 0; }

EDGEPRUNE_DOUBLE int cuGetErrorString(int result, const char** text) {
  *text = result == kNoDevice         ? "no CUDA-capable device is detected"
          : result == kInvalidContext ? "invalid device context"
                                      : "double";
  return 0;
}

EDGEPRUNE_DOUBLE int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? 0 : kInvalidValue;
}

EDGEPRUNE_DOUBLE int cuDeviceGetAttribute(int* value, int attribute, int) {
  demand(attribute == 75 || attribute == 76, "an attribute that the double does not know");
  const auto sm = static_cast<int>(number_of("EDGEPRUNE_DOUBLE_SM", 89));
  *value = attribute == 75 ? sm / 10 : sm % 10;
  return 0;
}

EDGEPRUNE_DOUBLE int cuDevicePrimaryCtxRetain(void** context, int) {
  ++gpu().retained;
  *context = &context_handle;
  return 0;
}

EDGEPRUNE_DOUBLE int cuDevicePrimaryCtxRelease_v2(int) {
  if (--gpu().retained == 0) {
    demand(gpu().blocks.empty() && gpu().page_locked.empty(), "memory was not given back");
    demand(!gpu().has_stream, "the stream was not given back");
    note("released");
  }
  return 0;
}

EDGEPRUNE_DOUBLE int cuCtxPushCurrent_v2(void* context) {
  if (context != &context_handle || gpu().retained == 0) return kInvalidContext;
  current.push_back(context);
  return 0;
}

EDGEPRUNE_DOUBLE int cuCtxPopCurrent_v2(void** context) {
  demand(!current.empty(), "a context was popped that was not pushed");
  *context = current.back();
  current.pop_back();
  return 0;
}

EDGEPRUNE_DOUBLE int cuStreamCreate(void** stream, unsigned flags) {
  if (!is_current()) return kInvalidContext;
  demand(flags == 1 && !gpu().has_stream, "one stream that does not wait for the default one");
  gpu().has_stream = true;
  *stream = &stream_handle;
  return 0;
}

EDGEPRUNE_DOUBLE int cuStreamDestroy_v2(void* stream) {
  gpu_double::check_stream(stream);
  gpu().flush();
  gpu().has_stream = false;
  return 0;
}

EDGEPRUNE_DOUBLE int cuStreamSynchronize(void* stream) {
  if (!is_current()) return kInvalidContext;
  gpu_double::check_stream(stream);
  note("wait");
  gpu().flush();
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemAlloc_v2(unsigned long long* pointer, size_t size) {
  if (!is_current()) return kInvalidContext;
  if (size == 0) return kInvalidValue;
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  if (gpu().used() + size > std::min(kReserved, number_of("EDGEPRUNE_DOUBLE_MEMORY", kReserved))) return kOutOfMemory;
  // The first gap that is large enough.
  char* address = gpu().memory;
  for (const auto& [block, bytes] : gpu().blocks) {
    if (address + size <= block) break;
    address = block + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  if (address + size > gpu().memory + kReserved) return kOutOfMemory;
  gpu().blocks[address] = size;
  gpu().open();
  std::memset(address, kGarbage, size);
  gpu().close();
  note("malloc " + std::to_string(size));
  *pointer = reinterpret_cast<uintptr_t>(address);
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemFree_v2(unsigned long long pointer) {
  if (!is_current()) return kInvalidContext;
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  gpu().flush();  // it waits for the device
  demand(gpu().blocks.erase(const_cast<char*>(address_of(pointer))) == 1, "memory is freed that is not allocated");
  note("free");
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemAllocHost_v2(void** memory, size_t size) {
  if (!is_current()) return kInvalidContext;
  auto* block = static_cast<char*>(std::malloc(size));
  std::memset(block, kGarbage, size);
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  gpu().page_locked[block] = size;
  *memory = block;
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemFreeHost(void* memory) {
  if (!is_current()) return kInvalidContext;
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  gpu().flush();
  demand(gpu().page_locked.erase(static_cast<char*>(memory)) == 1, "page-locked memory is freed that is not allocated");
  std::free(memory);
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemcpyHtoDAsync_v2(unsigned long long target, const void* source, size_t size, void* stream) {
  if (!is_current()) return kInvalidContext;
  gpu_double::check_stream(stream);
  gpu_double::check_range("copy to the device", address_of(target), size);
  demand(!gpu_double::is_on_device(source), "a copy to the device of what is there");
  note("upload " + std::to_string(size));
  const std::lock_guard<std::recursive_mutex> lock(gpu().working);
  gpu_double::put_on_stream([target, source, size] { std::memcpy(const_cast<char*>(address_of(target)), source, size); });
  // CUDA does not say when it reads such memory.
  gpu().pageable = !is_page_locked(source, size);
  return 0;
}

EDGEPRUNE_DOUBLE int cuMemcpyDtoHAsync_v2(void* target, unsigned long long source, size_t size, void* stream) {
  if (!is_current()) return kInvalidContext;
  gpu_double::check_stream(stream);
  gpu_double::check_range("copy to the host", address_of(source), size);
  {
    const std::lock_guard<std::recursive_mutex> lock(gpu().working);
    demand(is_page_locked(target, size), "a copy to other memory would hold up the stream");
  }
  note("read " + std::to_string(size));
  gpu_double::put_on_stream([target, source, size] { std::memcpy(target, address_of(source), size); });
  return 0;
}

}  // extern "C"
