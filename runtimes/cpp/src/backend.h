// What a runtime backend offers: graphs that run on tensors of one device.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "bundle/bundle.h"
#include "tensor.h"

namespace edgeprune {

class Graph {
 public:
  virtual ~Graph() = default;
  // Runs once. Inputs that the graph does not read are ignored, those in host memory are taken to the device; outputs
  // that are not named are allocated. The device may still be at work when this returns. Threads may share a graph.
  // Returns all outputs. Throws BackendError.
  virtual TensorMap run(const TensorMap& inputs, const TensorMap& outputs) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  // Opens a graph of a bundle: its ONNX file, or what was built from it. Throws BackendError: the backend cannot run it.
  virtual std::unique_ptr<Graph> load(const Bundle& bundle, const std::string& name) = 0;
  // Most rows of a prompt with its answer that the graphs take; none where the model alone limits them.
  virtual std::optional<int64_t> longest_sequence(const Bundle& bundle) = 0;
  // How many threads may load at the same time, to the good of the machine.
  virtual int loads_at_once() const { return 1; }
  // Uninitialised memory on the device; at least one element.
  virtual Tensor allocate(Shape shape, DataType type) = 0;
  // For a tensor that several graphs read: a copy on the device, where that saves taking it there each time, else the
  // tensor itself. A single number stays in host memory: it may be a size.
  virtual Tensor upload(const Tensor& tensor) = 0;
  // The tensor in host memory; waits for the device.
  virtual Tensor download(const Tensor& tensor) = 0;
};

struct BackendOptions {
  std::string backend = "onnxruntime";  // or "tensorrt"
  std::string provider = "cpu";  // of ONNX Runtime
  int threads = 0;               // of an operator, in ONNX Runtime; 0 lets it choose
  // Whether products between QuantizeLinear and DequantizeLinear may run on integers; FP8 must not, because ONNX Runtime
  // 1.31 takes it for INT8 and then finds the graph invalid.
  bool fuse_quantized = true;
  std::string library;       // of the backend; empty looks for it
};

// Throws BackendError: the backend is unknown or cannot run here.
std::unique_ptr<Backend> open_backend(const BackendOptions& options);

}  // namespace edgeprune
