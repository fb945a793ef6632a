// The library of edgeprune's operators as plugins (plugins/tensorrt): finding it, checking it, giving it to TensorRT.
#pragma once

#include <string>

#include "tensorrt/tensorrt_library.h"

namespace edgeprune {

// Gives the plugins to TensorRT, so that it reads engines that were built with them. The library is the file that the
// variable EDGEPRUNE_PLUGIN names, else libedgeprune_tensorrt.so beside this library, else where the linker looks.
// `needed` is plugin_version of the manifest.
// Throws BackendError: there is none, it does not fit, or the engines need another version.
void load_plugins(const TensorRtLibrary& tensorrt, const std::string& needed);

}  // namespace edgeprune
