// The one exception of the library: what went wrong and what mends it, in one line.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace edgeprune {

// What is unusable; the C ABI gives each a status of its own.
enum class ErrorKind { argument, bundle, picture, prompt, backend, pruning };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

struct ArgumentError : Error {
  explicit ArgumentError(const std::string& message) : Error(ErrorKind::argument, message) {}
};
struct BundleError : Error {
  explicit BundleError(const std::string& message) : Error(ErrorKind::bundle, message) {}
};
struct PictureError : Error {
  explicit PictureError(const std::string& message) : Error(ErrorKind::picture, message) {}
};
struct PromptError : Error {
  explicit PromptError(const std::string& message) : Error(ErrorKind::prompt, message) {}
};
struct BackendError : Error {
  explicit BackendError(const std::string& message) : Error(ErrorKind::backend, message) {}
};
struct PruningError : Error {
  explicit PruningError(const std::string& message) : Error(ErrorKind::pruning, message) {}
};

}  // namespace edgeprune
