#include "shared_library.h"

#include <dlfcn.h>

#include <cstdlib>

namespace edgeprune {

void* open_shared_library(const std::string& path, const char* variable, std::vector<std::string> names, std::string& why) {
  const char* named = std::getenv(variable);
  if (named != nullptr && *named != '\0') names = {named};
  if (!path.empty()) names = {path};
  for (const std::string& name : names) {
    if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return library;
    const char* said = dlerror();
    if (why.empty()) why = said != nullptr ? said : name;
  }
  return nullptr;
}

}  // namespace edgeprune
