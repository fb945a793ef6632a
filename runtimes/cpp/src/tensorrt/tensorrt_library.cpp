#include "tensorrt/tensorrt_library.h"

#include <dlfcn.h>

#include <cstring>
#include <sstream>
#include <vector>

#include "error.h"
#include "shared_library.h"

namespace edgeprune {
namespace {

#define EDGEPRUNE_TEXT_OF(value) #value
#define EDGEPRUNE_TEXT(value) EDGEPRUNE_TEXT_OF(value)
constexpr const char* kHeaders = EDGEPRUNE_TEXT(NV_TENSORRT_MAJOR) "." EDGEPRUNE_TEXT(NV_TENSORRT_MINOR);
constexpr int kMajor = NV_TENSORRT_MAJOR;
// setDeviceMemoryV2 is of 10.1, and nothing older than 10.3 was ever compiled against.
constexpr int kOldestMinorOf10 = 3;
constexpr const char* kOtherFile = "EDGEPRUNE_TENSORRT=…/libnvinfer.so";

void* open_library(const std::string& path) {
  std::string why;
  void* library =
      open_shared_library(path, "EDGEPRUNE_TENSORRT", {"libnvinfer.so." + std::to_string(kMajor), "libnvinfer.so"}, why);
  if (library != nullptr) return library;
  throw BackendError("TensorRT was not found (" + why + "): install the TensorRT " + std::to_string(kMajor) +
                     " that built the engines, name its library with " + kOtherFile + "." + std::to_string(kMajor) +
                     ", or run with --backend onnxruntime");
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  const void* address = dlsym(library, name);
  if (address == nullptr) {
    throw BackendError(std::string("the library that was opened is not TensorRT (it lacks ") + name + "): name another file with " +
                       kOtherFile);
  }
  static_assert(sizeof function == sizeof address);
  std::memcpy(&function, &address, sizeof function);
}

std::string in_one_line(const char* text) {
  std::istringstream words(text != nullptr ? text : "");
  std::string line;
  for (std::string word; words >> word;) line += (line.empty() ? "" : " ") + word;
  return line.substr(0, 400);
}

}  // namespace

void TensorRtLog::log(Severity severity, const char* message) noexcept {
  if (severity != Severity::kERROR && severity != Severity::kINTERNAL_ERROR) return;
  try {
    const std::lock_guard<std::mutex> lock(writing_);
    if (first_.empty()) first_ = in_one_line(message);
  } catch (...) {
    // No memory to keep it.
  }
}

void TensorRtLog::clear() {
  const std::lock_guard<std::mutex> lock(writing_);
  first_.clear();
}

std::string TensorRtLog::first() const {
  const std::lock_guard<std::mutex> lock(writing_);
  return first_;
}

TensorRtLibrary::TensorRtLibrary(const std::string& path) {
  void* library = open_library(path);
  int number = 0;
  for (const char* name :
       {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion", "getInferLibBuildVersion"}) {
    int32_t (*part)() = nullptr;
    find(library, name, part);
    const int value = part();
    if ((number == 0 && value != kMajor) || (number == 1 && kMajor == 10 && value < kOldestMinorOf10)) {
      throw BackendError("TensorRT " + (number == 0 ? std::to_string(value) : version_ + "." + std::to_string(value)) +
                         " is installed, and this libedgeprune was built with the headers of " + kHeaders +
                         ", for TensorRT " + (kMajor == 10 ? "10.3 or newer" : std::to_string(kMajor)) +
                         ": build it with -DTENSORRT_ROOT= of the installed one, or install another");
    }
    version_ += (number++ == 0 ? "" : ".") + std::to_string(value);
  }
  find(library, "createInferRuntime_INTERNAL", create_runtime_);
  find(library, "getPluginRegistry", registry_);
}

std::unique_ptr<nvinfer1::IRuntime> TensorRtLibrary::runtime(TensorRtLog& log) const {
  log.clear();
  // As createInferRuntime of the header does, which is not linked.
  auto* runtime = static_cast<nvinfer1::IRuntime*>(create_runtime_(&log, NV_TENSORRT_VERSION));
  if (runtime != nullptr) return std::unique_ptr<nvinfer1::IRuntime>(runtime);
  const std::string reason = log.first();
  throw BackendError("TensorRT " + version_ + " cannot start (" + (reason.empty() ? "no reason given" : reason) +
                     "): build libedgeprune with its headers, or run with --backend onnxruntime");
}

}  // namespace edgeprune
