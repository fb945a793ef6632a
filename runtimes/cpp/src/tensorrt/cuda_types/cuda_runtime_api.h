// What TensorRT's headers need of CUDA's: two opaque handles, which are the driver's CUstream and CUevent. So no CUDA
// toolkit has to be there.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
