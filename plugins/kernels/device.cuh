// What the kernels use of the hardware: launch, asynchronous copies, tensor cores, fast division.
//
// tests/plugins/emulator executes the same kernel sources on the host. It brings its own version of what stands in
// the first part here, and CUDA's names for threads, barriers and warp operations. It cannot have static shared memory:
// kernels take all of it through EDGEPRUNE_SHARED.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernel_types.h"

#ifdef EDGEPRUNE_EMULATED
#include "emulated_device.h"
#else

#define EDGEPRUNE_SHARED(name) extern __shared__ __align__(16) char name[]

namespace edgeprune {

// Nothing waits here: the launch is checked, what the kernel does is not.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for; without a GPU's limit in the way this is a host call
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory without a register between; zeros if not `valid`.
__device__ inline void copy_async(void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `Pending` of this thread's committed groups are under way.
template <int Pending>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8×8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16×8] += a[16×16] · b[16×8], summed in float32.
template <typename T>
__device__ inline void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void multiply_matrices<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                 uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void multiply_matrices<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x to two units in the last place; results below 2^-126 are 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace edgeprune
#endif  // EDGEPRUNE_EMULATED

namespace edgeprune {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kMaxGridYZ = 65535;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline size_t align_256(size_t bytes) { return (bytes + 255) / 256 * 256; }

// n / divisor for 0 ≤ n < 2³¹ by a multiplication: q = (⌊n·m / 2³²⌋ + n) >> s with s = ⌈log₂ d⌉ and
// m = ⌊2³²·(2ˢ - d) / d⌋ + 1.
struct FastDivide {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// 16 bytes as float32 numbers.
template <typename T>
struct Unit {
  static constexpr int kElements = 16 / sizeof(T);

  static __device__ void widen(const uint4& bits, float (&values)[kElements]) {
    T elements[kElements];
    memcpy(static_cast<void*>(elements), &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = static_cast<float>(elements[i]);
  }
};

// Whether rows of `row_bytes` can be read 16 bytes at a time.
inline bool reads_units(const void* data, int64_t row_bytes) {
  return row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

}  // namespace edgeprune
