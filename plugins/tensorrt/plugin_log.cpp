#include "plugin_log.h"

#include <atomic>
#include <cstdio>

namespace edgeprune {
namespace {

// TensorRT's contract for plugin libraries: one finder per process, given to setLoggerFinder.
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void report_error(const char* plugin, const std::string& message) noexcept {
  try {
    const std::string text = std::string("edgeprune.") + plugin + ": " + message;
    nvinfer1::ILoggerFinder* const finder = logger_finder;
    nvinfer1::ILogger* const logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger == nullptr) {
      std::fprintf(stderr, "%s\n", text.c_str());
    } else {
      logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    }
  } catch (...) {
    std::fprintf(stderr, "edgeprune.%s: failed\n", plugin);
  }
}

}  // namespace edgeprune
