// The part of ONNX Runtime's C ABI that is called: places in the function table OrtApi and signatures.
//
// The table only grows at its end, so a place holds for every later version. Nothing of ONNX Runtime is needed to
// compile this; tests/abi_check.cpp compares every line with onnxruntime_c_api.h where that header is installed.
// Source: include/onnxruntime/core/session/onnxruntime_c_api.h, version 1.21.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgeprune::ort {

struct Env;
struct Status;
struct MemoryInfo;
struct Session;
struct Value;
struct RunOptions;
struct TensorTypeAndShapeInfo;
struct SessionOptions;
struct Allocator;
struct IoBinding;
struct ThreadingOptions;
struct CudaProviderOptions;

// The lowest version that has every function below; what is asked for.
constexpr uint32_t kApiVersion = 20;

constexpr int kLogError = 3;
constexpr int kElementFloat = 1;
constexpr int kElementInt64 = 7;
constexpr int kElementFloat16 = 10;
constexpr int kDeviceAllocator = 0;
constexpr int kMemoryTypeDefault = 0;

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// place, name in OrtApi, result, arguments
#define EDGEPRUNE_ORT_FUNCTIONS(F)                                                                                \
  F(2, GetErrorMessage, const char*, (const Status*))                                                             \
  F(6, DisableTelemetryEvents, Status*, (const Env*))                                                             \
  F(7, CreateSession, Status*, (const Env*, const char*, const SessionOptions*, Session**))                       \
  F(9, Run, Status*,                                                                                              \
    (Session*, const RunOptions*, const char* const*, const Value* const*, size_t, const char* const*, size_t,    \
     Value**))                                                                                                    \
  F(10, CreateSessionOptions, Status*, (SessionOptions**))                                                        \
  F(22, SetSessionLogSeverityLevel, Status*, (SessionOptions*, int))                                              \
  F(24, SetIntraOpNumThreads, Status*, (SessionOptions*, int))                                                    \
  F(30, SessionGetInputCount, Status*, (const Session*, size_t*))                                                 \
  F(31, SessionGetOutputCount, Status*, (const Session*, size_t*))                                                \
  F(36, SessionGetInputName, Status*, (const Session*, size_t, Allocator*, char**))                               \
  F(37, SessionGetOutputName, Status*, (const Session*, size_t, Allocator*, char**))                              \
  F(49, CreateTensorWithDataAsOrtValue, Status*,                                                                  \
    (const MemoryInfo*, void*, size_t, const int64_t*, size_t, int, Value**))                                     \
  F(51, GetTensorMutableData, Status*, (Value*, void**))                                                          \
  F(60, GetTensorElementType, Status*, (const TensorTypeAndShapeInfo*, int*))                                     \
  F(61, GetDimensionsCount, Status*, (const TensorTypeAndShapeInfo*, size_t*))                                    \
  F(62, GetDimensions, Status*, (const TensorTypeAndShapeInfo*, int64_t*, size_t))                                \
  F(65, GetTensorTypeAndShape, Status*, (const Value*, TensorTypeAndShapeInfo**))                                 \
  F(68, CreateMemoryInfo, Status*, (const char*, int, int, int, MemoryInfo**))                                    \
  F(69, CreateCpuMemoryInfo, Status*, (int, int, MemoryInfo**))                                                   \
  F(75, AllocatorAlloc, Status*, (Allocator*, size_t, void**))                                                    \
  F(76, AllocatorFree, Status*, (Allocator*, void*))                                                              \
  F(78, GetAllocatorWithDefaultOptions, Status*, (Allocator**))                                                   \
  F(92, ReleaseEnv, void, (Env*))                                                                                 \
  F(93, ReleaseStatus, void, (Status*))                                                                           \
  F(94, ReleaseMemoryInfo, void, (MemoryInfo*))                                                                   \
  F(95, ReleaseSession, void, (Session*))                                                                         \
  F(96, ReleaseValue, void, (Value*))                                                                             \
  F(99, ReleaseTensorTypeAndShapeInfo, void, (TensorTypeAndShapeInfo*))                                           \
  F(100, ReleaseSessionOptions, void, (SessionOptions*))                                                          \
  F(119, CreateEnvWithGlobalThreadPools, Status*, (int, const char*, const ThreadingOptions*, Env**))             \
  F(120, DisablePerSessionThreads, Status*, (SessionOptions*))                                                    \
  F(121, CreateThreadingOptions, Status*, (ThreadingOptions**))                                                   \
  F(122, ReleaseThreadingOptions, void, (ThreadingOptions*))                                                      \
  F(125, GetAvailableProviders, Status*, (char***, int*))                                                         \
  F(126, ReleaseAvailableProviders, Status*, (char**, int))                                                       \
  F(130, AddSessionConfigEntry, Status*, (SessionOptions*, const char*, const char*))                             \
  F(131, CreateAllocator, Status*, (const Session*, const MemoryInfo*, Allocator**))                              \
  F(132, ReleaseAllocator, void, (Allocator*))                                                                    \
  F(133, RunWithBinding, Status*, (Session*, const RunOptions*, const IoBinding*))                                \
  F(134, CreateIoBinding, Status*, (Session*, IoBinding**))                                                       \
  F(135, ReleaseIoBinding, void, (IoBinding*))                                                                    \
  F(136, BindInput, Status*, (IoBinding*, const char*, const Value*))                                             \
  F(137, BindOutput, Status*, (IoBinding*, const char*, const Value*))                                            \
  F(138, BindOutputToDevice, Status*, (IoBinding*, const char*, const MemoryInfo*))                               \
  F(140, GetBoundOutputValues, Status*, (const IoBinding*, Allocator*, Value***, size_t*))                        \
  F(147, SetGlobalIntraOpNumThreads, Status*, (ThreadingOptions*, int))                                           \
  F(148, SetGlobalInterOpNumThreads, Status*, (ThreadingOptions*, int))                                           \
  F(149, SetGlobalSpinControl, Status*, (ThreadingOptions*, int))                                                 \
  F(204, SessionOptionsAppendExecutionProvider_CUDA_V2, Status*, (SessionOptions*, const CudaProviderOptions*))   \
  F(205, CreateCUDAProviderOptions, Status*, (CudaProviderOptions**))                                             \
  F(208, ReleaseCUDAProviderOptions, void, (CudaProviderOptions*))

struct Api {
#define EDGEPRUNE_ORT_MEMBER(place, name, result, arguments) result(*name) arguments;
  EDGEPRUNE_ORT_FUNCTIONS(EDGEPRUNE_ORT_MEMBER)
#undef EDGEPRUNE_ORT_MEMBER
};

}  // namespace edgeprune::ort
