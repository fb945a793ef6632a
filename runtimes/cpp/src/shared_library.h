// Finding the library of a backend when a session is opened.
#pragma once

#include <string>
#include <vector>

namespace edgeprune {

// Opens the file `path`, else the one that the environment variable names, else the first of `names` that the linker
// finds. Null where there is none: `why` is then what the linker said of the first.
void* open_shared_library(const std::string& path, const char* variable, std::vector<std::string> names, std::string& why);

}  // namespace edgeprune
