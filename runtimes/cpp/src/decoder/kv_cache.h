// Keys and values of the layers of one segment.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "backend.h"

namespace edgeprune {

// A graph reads the cached rows and writes all rows, the new ones included, so there are two buffers that swap roles:
// nothing is copied between steps. Both are allocated once, at the rows that entered the segment plus the tokens that
// may be generated.
class SegmentCache {
 public:
  struct Geometry {
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
    DataType type = DataType::float32;
  };

  SegmentCache(Backend& backend, std::vector<int64_t> layers, const Geometry& geometry, int64_t capacity);

  int64_t length() const { return length_; }
  // The cached rows, as a segment's inputs.
  TensorMap past() const;
  // Where the segment writes all rows, as its outputs. Throws std::length_error: the rows do not fit.
  TensorMap present(int64_t num_new) const;
  // The segment has run: what it wrote is the cache now.
  void advance(int64_t num_new);
  // Keeps some of the rows (int64 [K], ascending) only, in buffers that are smaller by the others.
  void compact(const Graph& graph, const Tensor& rows);

 private:
  void allocate();
  void add_tensors(TensorMap& tensors, const Tensor& buffer, int64_t length, const char* kind) const;

  Backend* backend_;
  std::vector<int64_t> layers_;
  Geometry geometry_;
  int64_t length_ = 0;
  int64_t capacity_;
  int64_t stride_ = 0;  // elements from one layer's keys to its values: each begins at an aligned address
  std::array<Tensor, 2> buffers_;
  size_t front_ = 0;
};

}  // namespace edgeprune
