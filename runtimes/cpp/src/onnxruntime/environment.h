// ONNX Runtime's environment: one in a process, with one pool of threads that the graphs of all sessions can share.
#pragma once

#include "onnxruntime/abi.h"
#include "onnxruntime/library.h"

namespace edgeprune::ort {

class Environment {
 public:
  // `threads` of an operator; 0 lets ONNX Runtime choose. The first environment of a process makes the pool.
  // Throws BackendError.
  Environment(const Library& library, int threads);
  ~Environment();
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

  Env* get() const { return env_; }
  // Whether the pool has as many threads as were asked for. (There is none where the program around the library made the
  // environment before it, without one; ONNX Runtime cannot be asked.)
  bool pool_fits() const { return pool_fits_; }

 private:
  const Library* library_;
  Env* env_ = nullptr;
  bool pool_fits_ = false;
};

}  // namespace edgeprune::ort
