// ONNX Runtime's shared library, opened at run time: whatever version the machine has, from 1.20 on.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "onnxruntime/abi.h"

namespace edgeprune::ort {

// Opened once and never closed: its threads outlive a dlclose.
class Library {
 public:
  // Looks at `path`, at the variable EDGEPRUNE_ONNXRUNTIME, and where the linker looks.
  // Throws BackendError: there is none, or it is too old.
  explicit Library(const std::string& path);

  const Api& api() const { return api_; }
  const std::string& version() const { return version_; }

  // Throws BackendError with the first line of what ONNX Runtime said, behind `doing`.
  void check(Status* status, const std::string& doing) const;
  std::vector<std::string> providers() const;

 private:
  Api api_{};
  std::string version_;
};

}  // namespace edgeprune::ort
