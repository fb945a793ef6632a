#include "onnxruntime/library.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>

#include "error.h"
#include "shared_library.h"

namespace edgeprune::ort {
namespace {

void* open_library(const std::string& path) {
  std::string why;
  void* library = open_shared_library(path, "EDGEPRUNE_ONNXRUNTIME", {"libonnxruntime.so.1", "libonnxruntime.so"}, why);
  if (library != nullptr) return library;
  throw BackendError("ONNX Runtime was not found (" + why +
                     "): install its library, or name the file with EDGEPRUNE_ONNXRUNTIME=…/libonnxruntime.so.1");
}

template <typename Function>
void set(Function& function, const void* address) {
  static_assert(sizeof function == sizeof address);
  std::memcpy(&function, &address, sizeof function);
}

std::string first_line(const std::string& text) {
  const size_t begin = text.find_first_not_of(" \n");
  if (begin == std::string::npos) return "unknown error";
  return text.substr(begin, std::min<size_t>(text.find('\n', begin) - begin, 300));
}

}  // namespace

Library::Library(const std::string& path) {
  void* library = open_library(path);
  const ApiBase* (*get_base)() = nullptr;
  set(get_base, dlsym(library, "OrtGetApiBase"));
  if (get_base == nullptr) {
    throw BackendError("the library that was opened is not ONNX Runtime: name another file with EDGEPRUNE_ONNXRUNTIME");
  }
  const ApiBase* base = get_base();
  version_ = base->get_version();
  const void* const* table = base->get_api(kApiVersion);
  if (table == nullptr) {
    throw BackendError("ONNX Runtime " + version_ + " is too old: install 1." + std::to_string(kApiVersion) + " or newer");
  }
#define EDGEPRUNE_ORT_SET(place, name, result, arguments) set(api_.name, table[place]);
  EDGEPRUNE_ORT_FUNCTIONS(EDGEPRUNE_ORT_SET)
#undef EDGEPRUNE_ORT_SET
}

void Library::check(Status* status, const std::string& doing) const {
  if (status == nullptr) return;
  const std::string message = api_.GetErrorMessage(status);
  api_.ReleaseStatus(status);
  throw BackendError("ONNX Runtime " + doing + " (" + first_line(message) + ")");
}

std::vector<std::string> Library::providers() const {
  char** names = nullptr;
  int count = 0;
  check(api_.GetAvailableProviders(&names, &count), "cannot list its providers");
  const std::vector<std::string> found(names, names + count);
  check(api_.ReleaseAvailableProviders(names, count), "cannot list its providers");
  return found;
}

}  // namespace edgeprune::ort
