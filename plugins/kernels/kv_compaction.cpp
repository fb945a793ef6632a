// KV compaction is a gather of two tensors with one block per head; this file belongs to both libraries.
#include "kv_compaction.h"

#include "token_gather.h"

cudaError_t edgeprune_compact_cache(const edgeprune::CacheLayer* layer, const void* keys, const void* values,
                                    const int64_t* keep_indices, int64_t kept, void* kept_keys,
                                    void* kept_values, cudaStream_t stream) {
  if (layer->capacity < layer->cached_rows || layer->target_capacity < kept) return cudaErrorInvalidValue;
  edgeprune::GatheredTensor tensor = {};
  tensor.outer = static_cast<int64_t>(layer->batch) * layer->key_heads;
  tensor.rows = layer->cached_rows;
  tensor.row_bytes = layer->row_bytes;
  tensor.source_stride = layer->capacity * layer->row_bytes;
  tensor.target_stride = layer->target_capacity * layer->row_bytes;
  edgeprune::GatheredTensor both[2] = {tensor, tensor};
  both[0].source = keys;
  both[0].target = kept_keys;
  both[1].source = values;
  both[1].target = kept_values;
  return edgeprune_token_gather(both, 2, keep_indices, kept, stream);
}
