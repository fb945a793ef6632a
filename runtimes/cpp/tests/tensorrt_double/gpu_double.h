// A double of an NVIDIA GPU: what libcuda's double offers libnvinfer's beside CUDA's functions.
//
// It is a double because no machine that runs these tests executes engines. So it shows that the backend asks for the right
// things in the right order, and nothing about kernels or their speed. What the real ones demand is enforced; whoever does
// otherwise ends the process with a line that begins with "double:".
//
// Variables: EDGEPRUNE_DOUBLE_NOTES (a file to which a line is added for everything that happens), EDGEPRUNE_DOUBLE_MEMORY
// (bytes of the GPU), EDGEPRUNE_DOUBLE_SM, EDGEPRUNE_DOUBLE_DEVICES (0 for none), EDGEPRUNE_DOUBLE_VERSION (of TensorRT).
#pragma once

#include <cstddef>
#include <functional>
#include <string>

#define EDGEPRUNE_DOUBLE __attribute__((visibility("default")))

namespace gpu_double {

[[noreturn]] EDGEPRUNE_DOUBLE void violation(const std::string& what);
EDGEPRUNE_DOUBLE void note(const std::string& line);
// The GPU is the calling thread's, and the stream the one that was made.
EDGEPRUNE_DOUBLE void check_stream(const void* stream);
// The bytes lie inside one allocation of the device.
EDGEPRUNE_DOUBLE void check_range(const std::string& what, const void* address, size_t size);
EDGEPRUNE_DOUBLE bool is_on_device(const void* address);
// Work waits on the stream until somebody waits for it; until then, and by the host at any time, the device's memory can
// neither be read nor written.
EDGEPRUNE_DOUBLE void put_on_stream(std::function<void()> work);

inline void demand(bool kept, const std::string& what) {
  if (!kept) violation(what);
}

}  // namespace gpu_double
