// TensorRT's shared library, opened at run time; compiled where its headers are.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <mutex>
#include <string>

namespace edgeprune {

// TensorRT's log, reduced to its first error: what follows are its consequences.
class TensorRtLog final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override;
  void clear();
  // In one line; empty without an error.
  std::string first() const;

 private:
  mutable std::mutex writing_;
  std::string first_;
};

// Opened once and never closed: its threads and static objects are not made for being unloaded.
class TensorRtLibrary {
 public:
  // Looks at `path`, at the variable EDGEPRUNE_TENSORRT, and where the linker looks.
  // Throws BackendError: there is none, or none that the headers fit.
  explicit TensorRtLibrary(const std::string& path);

  // Such as "10.3.0.26".
  const std::string& version() const { return version_; }
  // Throws BackendError: TensorRT refuses. The log outlives the runtime.
  std::unique_ptr<nvinfer1::IRuntime> runtime(TensorRtLog& log) const;
  // Of the whole process.
  nvinfer1::IPluginRegistry& registry() const { return *registry_(); }

 private:
  std::string version_;
  void* (*create_runtime_)(void*, int32_t) = nullptr;
  nvinfer1::IPluginRegistry* (*registry_)() = nullptr;
};

}  // namespace edgeprune
