#include "decoder/kv_cache.h"

#include <stdexcept>
#include <utility>

#include "decoder/tensor_names.h"

namespace edgeprune {
namespace {

// TensorRT takes no tensor that begins elsewhere (IExecutionContext::setTensorAddress).
constexpr int64_t kAlignment = 256;

}  // namespace

SegmentCache::SegmentCache(Backend& backend, std::vector<int64_t> layers, const Geometry& geometry, int64_t capacity)
    : backend_(&backend), layers_(std::move(layers)), geometry_(geometry), capacity_(capacity) {
  allocate();
}

void SegmentCache::allocate() {
  const auto step = kAlignment / static_cast<int64_t>(element_bytes(geometry_.type));
  const int64_t elements = element_count({geometry_.num_kv_heads, capacity_, geometry_.head_dim});
  stride_ = (elements + step - 1) / step * step;
  const Shape shape = {2 * static_cast<int64_t>(layers_.size()), stride_};
  for (Tensor& buffer : buffers_) buffer = backend_->allocate(shape, geometry_.type);
  front_ = 0;
}

TensorMap SegmentCache::past() const {
  TensorMap tensors;
  add_tensors(tensors, buffers_[front_], length_, names::kPast);
  return tensors;
}

TensorMap SegmentCache::present(int64_t num_new) const {
  if (length_ + num_new > capacity_) throw std::length_error("the rows do not fit into a cache");
  TensorMap tensors;
  add_tensors(tensors, buffers_[1 - front_], length_ + num_new, names::kPresent);
  return tensors;
}

void SegmentCache::advance(int64_t num_new) {
  length_ += num_new;
  front_ = 1 - front_;
}

void SegmentCache::compact(const Graph& graph, const Tensor& rows) {
  const int64_t kept = rows.shape.front();
  const TensorMap before = past();
  capacity_ -= length_ - kept;
  length_ = kept;
  allocate();
  const TensorMap after = past();
  for (const int64_t layer : layers_) {
    const std::string key = names::cached(names::kPast, layer, "key"), value = names::cached(names::kPast, layer, "value");
    graph.run({{names::kKeepIndices, rows}, {names::kCachedKey, before.at(key)}, {names::kCachedValue, before.at(value)}},
              {{names::out(names::kCachedKey), after.at(key)}, {names::out(names::kCachedValue), after.at(value)}});
  }
}

void SegmentCache::add_tensors(TensorMap& tensors, const Tensor& buffer, int64_t length, const char* kind) const {
  const Shape shape = {1, geometry_.num_kv_heads, length, geometry_.head_dim};
  for (size_t index = 0; index < layers_.size(); ++index) {
    const auto place = static_cast<int64_t>(index);
    tensors[names::cached(kind, layers_[index], "key")] = buffer.view(shape, 2 * place * stride_);
    tensors[names::cached(kind, layers_[index], "value")] = buffer.view(shape, (2 * place + 1) * stride_);
  }
}

}  // namespace edgeprune
