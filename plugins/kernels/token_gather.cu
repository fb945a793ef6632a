// TokenGather: one launch for all tensors. A block belongs to one tensor and moves a run of accesses, each the widest
// (16 bytes at best) that divides the tensor's rows, strides and addresses. A thread has four reads under way before
// it writes, which is what keeps memory busy; which row an access belongs to costs two multiplications.
#include "device.cuh"
#include "token_gather.h"

namespace edgeprune {
namespace {

constexpr int kThreads = 256;
constexpr int kAccesses = 4;  // per thread

struct Part {
  const char* source;
  char* target;
  int64_t source_stride, target_stride, row_bytes, rows;
  FastDivide per_row;   // accesses per row
  FastDivide per_block;  // rows per outer block: kept
  uint32_t accesses;
  uint32_t first_block;
  int32_t width;  // bytes of an access
};

struct Parts {
  Part part[kMaxGathered];
  const int64_t* keep_indices;
  int32_t count;
};

template <typename Access>
__device__ void move_rows(const Part& part, const int64_t* keep_indices) {
  const uint32_t first = (blockIdx.x - part.first_block) * (kThreads * kAccesses) + threadIdx.x;
  Access value[kAccesses] = {};
  int64_t target[kAccesses];
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    const uint32_t access = first + i * kThreads;
    if (access >= part.accesses) continue;
    const uint32_t row = part.per_row.quotient(access);
    const uint32_t outer = part.per_block.quotient(row);
    const uint32_t kept = row - outer * part.per_block.divisor;
    const int64_t column = static_cast<int64_t>(access - row * part.per_row.divisor) * sizeof(Access);
    target[i] = outer * part.target_stride + kept * part.row_bytes + column;
    const int64_t index = keep_indices[kept];
    if (index >= 0 && index < part.rows) {
      const char* source = part.source + outer * part.source_stride + index * part.row_bytes + column;
      value[i] = __ldg(reinterpret_cast<const Access*>(source));
    }
  }
#pragma unroll
  for (int i = 0; i < kAccesses; ++i) {
    if (first + i * kThreads < part.accesses) *reinterpret_cast<Access*>(part.target + target[i]) = value[i];
  }
}

__global__ __launch_bounds__(kThreads, 4) void gather_rows(const __grid_constant__ Parts parts) {
  int n = 0;
  while (n + 1 < parts.count && blockIdx.x >= parts.part[n + 1].first_block) ++n;
  const Part& part = parts.part[n];
  switch (part.width) {
    case 16: return move_rows<uint4>(part, parts.keep_indices);
    case 8: return move_rows<uint2>(part, parts.keep_indices);
    case 4: return move_rows<unsigned int>(part, parts.keep_indices);
    case 2: return move_rows<unsigned short>(part, parts.keep_indices);
    default: return move_rows<unsigned char>(part, parts.keep_indices);
  }
}

// The widest access that fits everything that is added up to an address.
int32_t access_width(const GatheredTensor& t) {
  uint64_t bits = reinterpret_cast<uintptr_t>(t.source) | reinterpret_cast<uintptr_t>(t.target) |
                  static_cast<uint64_t>(t.row_bytes) | 16;
  if (t.outer > 1) bits |= static_cast<uint64_t>(t.source_stride) | static_cast<uint64_t>(t.target_stride);
  return static_cast<int32_t>(bits & (~bits + 1));
}

}  // namespace
}  // namespace edgeprune

cudaError_t edgeprune_token_gather(const edgeprune::GatheredTensor* tensors, int32_t count,
                                   const int64_t* keep_indices, int64_t kept, cudaStream_t stream) {
  using namespace edgeprune;
  if (!is_valid(tensors, count, kept)) return cudaErrorInvalidValue;
  Parts parts = {};
  parts.keep_indices = keep_indices;
  int64_t blocks = 0;
  for (int32_t n = 0; n < count; ++n) {
    const GatheredTensor& t = tensors[n];
    if (t.outer == 0 || kept == 0 || t.row_bytes == 0) continue;
    const int32_t width = access_width(t);
    const int64_t per_row = t.row_bytes / width;
    // In this order no product overflows: each factor is below 2³¹ when it is multiplied.
    constexpr int64_t kLimit = int64_t{1} << 31;
    if (per_row >= kLimit || t.outer >= kLimit || kept >= kLimit || t.outer * kept >= kLimit ||
        t.outer * kept * per_row >= kLimit) {
      return cudaErrorInvalidValue;
    }
    Part& part = parts.part[parts.count++];
    part.source = static_cast<const char*>(t.source);
    part.target = static_cast<char*>(t.target);
    part.source_stride = t.source_stride;
    part.target_stride = t.target_stride;
    part.row_bytes = t.row_bytes;
    part.rows = t.rows;
    part.per_row = FastDivide(static_cast<uint32_t>(per_row));
    part.per_block = FastDivide(static_cast<uint32_t>(kept));
    part.accesses = static_cast<uint32_t>(t.outer * kept * per_row);
    part.first_block = static_cast<uint32_t>(blocks);
    part.width = width;
    blocks += ceil_div(part.accesses, kThreads * kAccesses);
  }
  return launch(gather_rows, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, parts);
}
