// AttentionScore: the choice among three ways, and the last step that two of them share.
//
// Probabilities of many rows (attention_score_tiles.cu): tensor-core tiles, computed twice. The first time the maximum
// and the sum of each row are found, the second time the probabilities, which are summed up at once. Nothing of size
// R×S is ever written: computing a tile again costs less than writing and reading it.
// Probabilities of few rows, such as the last one, and logits (attention_score_vectors.cu): memory-bound, keys are
// read once.
#include "attention_plan.h"

namespace edgeprune {
namespace {

constexpr int kSumKeys = 32, kSumLanes = 8;

// Parts are added in a fixed order: eight lanes take every eighth part, then lanes are added in turn.
__global__ __launch_bounds__(kSumKeys * kSumLanes) void add_parts(const float* parts, float* score, int count,
                                                                  int groups, int keys, float factor) {
  EDGEPRUNE_SHARED(shared);
  float* lanes = reinterpret_cast<float*>(shared);
  const int column = static_cast<int>(threadIdx.x) % kSumKeys, lane = static_cast<int>(threadIdx.x) / kSumKeys;
  const int j = static_cast<int>(blockIdx.x) * kSumKeys + column, g = blockIdx.y;
  const int64_t b = blockIdx.z;
  float sum = 0;
  if (j < keys) {
#pragma unroll 4
    for (int part = lane; part < count; part += kSumLanes) {
      sum += parts[((b * count + part) * groups + g) * keys + j];
    }
  }
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && j < keys) {
    for (int other = 1; other < kSumLanes; ++other) sum += lanes[other * kSumKeys + column];
    score[(b * groups + g) * keys + j] = sum * factor;
  }
}

}  // namespace

cudaError_t sum_parts(const AttentionArguments& a, int32_t count, float factor, cudaStream_t stream) {
  const AttentionScoreProblem& p = a.problem;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.keys, kSumKeys)), p.groups, p.batch);
  return launch(add_parts, grid, kSumKeys * kSumLanes, sizeof(float) * kSumKeys * kSumLanes, stream, a.parts,
                a.score, count, p.groups, p.keys, factor);
}

}  // namespace edgeprune

size_t edgeprune_attention_score_workspace(const edgeprune::AttentionScoreProblem* problem) {
  using namespace edgeprune;
  if (!is_valid(*problem, problem)) return 0;
  return static_cast<size_t>(plan_attention(*problem).bytes);
}

size_t edgeprune_attention_score_workspace_bound(const edgeprune::AttentionScoreProblem* problem) {
  using namespace edgeprune;
  AttentionScoreProblem all_rows = *problem;  // which of the rows score changes nothing
  all_rows.query_length = all_rows.rows;
  return is_valid(all_rows, nullptr) ? static_cast<size_t>(workspace_bound(all_rows)) : 0;
}

cudaError_t edgeprune_attention_score(const edgeprune::AttentionScoreProblem* problem, const void* query,
                                      const void* key, const int64_t* query_rows, const int64_t* row_index,
                                      const float* row_weight, float* score, void* workspace,
                                      cudaStream_t stream) {
  using namespace edgeprune;
  const AttentionScoreProblem& p = *problem;
  // Heads, groups and batch entries are coordinates of the grid.
  if (!is_valid(p, query_rows) || static_cast<int64_t>(p.batch) * p.key_heads > kMaxGridYZ ||
      p.groups > kMaxGridYZ / 32) {
    return cudaErrorInvalidValue;
  }
  AttentionArguments a = {};
  a.problem = p;
  a.plan = plan_attention(p);
  a.per_head = FastDivide(static_cast<uint32_t>(std::max(p.rows, 1)));
  a.scale_log2 = p.scale * 1.44269504f;
  a.query = query;
  a.key = key;
  a.query_rows = query_rows;
  a.row_index = row_index;
  a.row_weight = row_weight;
  a.score = score;
  char* bytes = static_cast<char*>(workspace);
  a.statistics = reinterpret_cast<float2*>(bytes + a.plan.statistics);
  a.vectors = reinterpret_cast<float*>(bytes + a.plan.vectors);
  a.logits = reinterpret_cast<float*>(bytes + a.plan.logits);
  a.parts = reinterpret_cast<float*>(bytes + a.plan.parts);
  switch (a.plan.path) {
    case AttentionPath::few_rows: return score_few_rows(a, stream);
    case AttentionPath::logits: return score_logits(a, stream);
    default: return score_tiles(a, stream);
  }
}
