// Errors of the plugins, told to the logger of whoever uses them.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace edgeprune {

// TensorRT gives it when it loads the library; null takes it away.
void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Logs an error as "edgeprune.<plugin>: <message>"; to standard error where TensorRT has given no logger.
void report_error(const char* plugin, const std::string& message) noexcept;

}  // namespace edgeprune
