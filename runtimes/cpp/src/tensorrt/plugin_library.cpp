#include "tensorrt/plugin_library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "error.h"

namespace edgeprune {
namespace {

constexpr const char* kLibrary = "libedgeprune_tensorrt.so";
constexpr const char* kNamespace = "edgeprune";  // plugins/tensorrt/plugin_version.h
constexpr const char* kVersion = "1";
constexpr const char* kBuild = "build it with python -m edgeprune.plugins.build";
constexpr const char* kMark = "edgeprune plugin ";

// What edgeprune_plugin_built_for of plugins/tensorrt/plugin_library.cpp returns, read in the file, so that a library that
// does not fit is never loaded.
struct BuiltFor {
  int version = 0, major = 0, minor = 0;
};

std::filesystem::path find_library() {
  const char* variable = std::getenv("EDGEPRUNE_PLUGIN");
  if (variable != nullptr && *variable != '\0') return variable;
  Dl_info own;
  if (dladdr(reinterpret_cast<const void*>(&load_plugins), &own) != 0 && own.dli_fname != nullptr) {
    const std::filesystem::path beside = std::filesystem::path(own.dli_fname).parent_path() / kLibrary;
    std::error_code failed;
    if (std::filesystem::is_regular_file(beside, failed)) return beside;
  }
  if (void* found = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL)) {
    void* symbol = dlsym(found, "edgeprune_plugin_built_for");
    if (symbol != nullptr && dladdr(symbol, &own) != 0) return own.dli_fname;
  }
  throw BackendError(std::string("the engines need the plugin library, and there is none: ") + kBuild +
                     " where TensorRT's headers are, or set EDGEPRUNE_PLUGIN");
}

BuiltFor built_for(const std::filesystem::path& path) {
  std::error_code failed;
  if (!std::filesystem::is_regular_file(path, failed)) {
    throw BackendError("the plugin library " + path.string() + " does not exist: " + kBuild + ", or correct EDGEPRUNE_PLUGIN");
  }
  std::ifstream file(path, std::ios::binary);
  const std::string content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  for (size_t at = content.find(kMark); at != std::string::npos; at = content.find(kMark, at + 1)) {
    BuiltFor found;
    if (std::sscanf(content.c_str() + at, "edgeprune plugin %d; TensorRT %d.%d;", &found.version, &found.major, &found.minor) == 3) {
      return found;
    }
  }
  throw BackendError(path.string() + " is no plugin library of edgeprune: " + kBuild + ", or set EDGEPRUNE_PLUGIN to another");
}

bool has_creators(const nvinfer1::IPluginRegistry& registry) {
  std::set<std::string> missing = {"AttentionScore", "ScoreSelect", "TokenGather", "TokenSelect"};
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* all = registry.getAllCreators(&count);
  for (int32_t index = 0; index < count; ++index) {
    // Asked for one that it lacks, a registry logs an error; its list does not. Only the third generation is ours.
    if (std::strcmp(all[index]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) continue;
    const auto* creator = static_cast<const nvinfer1::IPluginCreatorV3One*>(all[index]);
    if (std::strcmp(creator->getPluginNamespace(), kNamespace) == 0 && std::strcmp(creator->getPluginVersion(), kVersion) == 0) {
      missing.erase(creator->getPluginName());
    }
  }
  return missing.empty();
}

}  // namespace

void load_plugins(const TensorRtLibrary& tensorrt, const std::string& needed) {
  const std::filesystem::path path = find_library();
  const BuiltFor built = built_for(path);
  if (needed != std::to_string(built.version)) {
    throw BackendError("the engines were built with plugin version " + needed + ", " + path.string() + " has " +
                       std::to_string(built.version) + ": build them again with edgeprune build");
  }
  if (built.major != NV_TENSORRT_MAJOR) {
    throw BackendError(path.string() + " was compiled with the headers of TensorRT " + std::to_string(built.major) + "." +
                       std::to_string(built.minor) + ", but TensorRT " + tensorrt.version() + " needs those of " +
                       std::to_string(NV_TENSORRT_MAJOR) + ".x: " + kBuild + " --tensorrt-root DIR");
  }
  // TensorRT does not say why a library cannot be loaded.
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) == nullptr) {
    const char* said = dlerror();
    throw BackendError(path.string() + " cannot be loaded (" + (said != nullptr ? said : "no reason given") + "): " + kBuild);
  }
  nvinfer1::IPluginRegistry& registry = tensorrt.registry();
  if (!has_creators(registry)) registry.loadLibrary(path.c_str());
  if (!has_creators(registry)) {
    throw BackendError("TensorRT " + tensorrt.version() + " does not take the plugins of " + path.string() + ": " + kBuild +
                       " --tensorrt-root DIR and the headers of that version");
  }
}

}  // namespace edgeprune
