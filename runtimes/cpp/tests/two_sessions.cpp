// Several sessions in one process: opened and asked in two threads at once, with pools of one size and of two, and where
// the program has an environment of ONNX Runtime before the library does.
//
// two_sessions BUNDLE PICTURE: prints the threads that opening added in each case; exits with 1 if answers differ.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "edgeprune/edgeprune.hpp"

namespace {

using Json = nlohmann::ordered_json;

std::string bundle, picture;

edgeprune::VisionSession open(int threads) {
  edgeprune::VisionSession::Settings settings;
  settings.threads = threads;
  return edgeprune::VisionSession(bundle, settings);
}

std::string answer(const edgeprune::VisionSession& session) {
  std::vector<edgeprune::Image> images;
  images.push_back(edgeprune::Image::read(picture));
  edgeprune::Options options;
  options.max_new_tokens = 6;
  options.ignore_eos = true;
  Json whole = Json::parse(session.ask(images, "What is it?", options).json());
  whole.erase("timings_ms");
  return whole.dump();
}

int num_threads() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("Threads:", 0) == 0) return std::atoi(line.c_str() + 8);
  }
  throw std::runtime_error("no /proc/self/status");
}

int threads_of_session(int threads, const std::string& expected) {
  const int before = num_threads();
  const edgeprune::VisionSession session = open(threads);
  const int added = num_threads() - before;
  if (answer(session) != expected) throw std::runtime_error("another answer");
  return added;
}

void at_once(int first, int second, const std::string& expected) {
  const int sizes[] = {first, second};
  bool agree[] = {false, false};
  std::vector<std::thread> threads;
  for (size_t index = 0; index < 2; ++index) {
    threads.emplace_back([&, index] {
      try {
        const edgeprune::VisionSession session = open(sizes[index]);
        agree[index] = answer(session) == expected && answer(session) == expected;
      } catch (const edgeprune::Exception& error) {
        std::cerr << error.what() << '\n';
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (!agree[0] || !agree[1]) throw std::runtime_error("answers of two sessions at once differ");
}

// An environment without a pool, as a program makes it that uses ONNX Runtime itself. The places are those of abi.h.
class HostEnvironment {
 public:
  HostEnvironment() {
    void* library = dlopen(std::getenv("EDGEPRUNE_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
    using Base = struct { void* const* (*get_api)(uint32_t); };
    const Base* (*get_base)() = nullptr;
    void* address = dlsym(library, "OrtGetApiBase");
    std::memcpy(&get_base, &address, sizeof address);
    table_ = get_base()->get_api(20);
    void* (*create)(int, const char*, void**) = nullptr;
    std::memcpy(&create, &table_[3], sizeof create);
    if (create(3, "host", &env_) != nullptr) throw std::runtime_error("no environment");
  }
  ~HostEnvironment() {
    void (*release)(void*) = nullptr;
    std::memcpy(&release, &table_[92], sizeof release);
    release(env_);
  }

 private:
  void* const* table_ = nullptr;
  void* env_ = nullptr;
};

}  // namespace

int main(int, char** values) {
  bundle = values[1], picture = values[2];
  try {
    const std::string expected = answer(open(1));
    Json added;
    added["alone"] = threads_of_session(4, expected);
    {
      const edgeprune::VisionSession other = open(4);
      added["beside one of its size"] = threads_of_session(4, expected);
      added["beside one of another size"] = threads_of_session(3, expected);
    }
    at_once(0, 0, expected);
    at_once(2, 3, expected);
    const HostEnvironment host;
    added["in a program's environment"] = threads_of_session(4, expected);
    std::cout << added.dump() << '\n';
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
