// What a runtime backend offers: graphs that run on tensors of one device.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "tensor.h"

namespace edgeprune {

class Graph {
 public:
  virtual ~Graph() = default;
  // Runs once. Inputs that the graph does not read are ignored; outputs that are not named are allocated.
  // Threads may share a graph. Returns all outputs. Throws BackendError.
  virtual TensorMap run(const TensorMap& inputs, const TensorMap& outputs) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  // Throws BackendError: the backend cannot run the graph.
  virtual std::unique_ptr<Graph> load(const std::filesystem::path& path) = 0;
  // How many threads may load at the same time, to the good of the machine.
  virtual int loads_at_once() const { return 1; }
  // Uninitialised memory on the device; at least one element.
  virtual Tensor allocate(Shape shape, DataType type) = 0;
  // The tensor in host memory; waits for the device.
  virtual Tensor download(const Tensor& tensor) = 0;
};

struct BackendOptions {
  std::string backend = "onnxruntime";
  std::string provider = "cpu";
  int threads = 0;           // of an operator; 0 lets the backend choose
  // Whether products between QuantizeLinear and DequantizeLinear may run on integers; FP8 must not, because ONNX Runtime
  // 1.31 takes it for INT8 and then finds the graph invalid.
  bool fuse_quantized = true;
  std::string library;       // of the backend; empty looks for it
};

// Throws BackendError: the backend is unknown or cannot run here.
std::unique_ptr<Backend> open_backend(const BackendOptions& options);

}  // namespace edgeprune
