// Every place of abi.h is the place of that name in ONNX Runtime's own header. Compiling is the test.
#include <onnxruntime_c_api.h>

#include "onnxruntime/abi.h"

namespace {

#define EDGEPRUNE_CHECK_PLACE(place, name, result, arguments) \
  static_assert(offsetof(OrtApi, name) == (place) * sizeof(void*), #name " has moved");
EDGEPRUNE_ORT_FUNCTIONS(EDGEPRUNE_CHECK_PLACE)

static_assert(edgeprune::ort::kElementFloat == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(edgeprune::ort::kElementFloat16 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
static_assert(edgeprune::ort::kElementInt64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(edgeprune::ort::kLogError == ORT_LOGGING_LEVEL_ERROR);
static_assert(edgeprune::ort::kDeviceAllocator == OrtDeviceAllocator);
static_assert(edgeprune::ort::kMemoryTypeDefault == OrtMemTypeDefault);

}  // namespace
