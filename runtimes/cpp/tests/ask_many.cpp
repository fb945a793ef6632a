// Opens a bundle once and answers the requests that stand line by line in the input, through the public interface.
//
// ask_many BUNDLE [THREADS [REPEAT [PRUNER [BACKEND]]]]: a line is {"images": [paths], "prompt": …, options …}; the answer is a line of what
// edgeprune-run --json prints, or {"error": …, "status": …}. With "cancel_after", the answer is ended after so many pieces.
// With a PRUNER (pruners.h), the line also says what it has "seen".
// With several THREADS, each of them answers every request; the lines of the first one are printed if all agree.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "edgeprune/edgeprune.hpp"
#include "pruners.h"

namespace {

using Json = nlohmann::ordered_json;

edgeprune::Options options_of(const Json& request) {
  edgeprune::Options options;
  options.max_new_tokens = request.value("max_new_tokens", options.max_new_tokens);
  options.temperature = request.value("temperature", options.temperature);
  options.top_k = request.value("top_k", options.top_k);
  options.top_p = request.value("top_p", options.top_p);
  if (request.contains("seed")) options.seed = request["seed"].get<uint64_t>();
  if (request.contains("stop")) options.stop = request["stop"].get<std::vector<std::string>>();
  options.ignore_eos = request.value("ignore_eos", options.ignore_eos);
  return options;
}

std::string answer(const edgeprune::VisionSession& session, const Json& request) {
  pruners::seen() = Json::array();
  try {
    std::vector<edgeprune::Image> images;
    for (const Json& path : request["images"]) images.push_back(edgeprune::Image::read(path.get<std::string>()));
    std::string streamed;
    int pieces = 0;
    const int last = request.value("cancel_after", -1);
    const edgeprune::Reply reply = session.ask(images, request["prompt"].get<std::string>(), options_of(request), [&](std::string_view piece) {
      streamed += piece;
      return ++pieces != last;
    });
    Json whole = Json::parse(reply.json());
    whole["streamed"] = streamed;
    whole["seen"] = pruners::seen();
    return whole.dump();
  } catch (const edgeprune::Exception& error) {
    return Json({{"error", error.what()}, {"status", error.status()}}).dump();
  } catch (const std::domain_error& error) {
    return Json({{"thrown", error.what()}}).dump();
  }
}

// What two answers to one request must share.
std::string comparable(const std::string& line) {
  Json whole = Json::parse(line);
  whole.erase("timings_ms");
  return whole.dump();
}

}  // namespace

int main(int count, char** values) {
  const int num_threads = count > 2 ? std::atoi(values[2]) : 1;
  const int repeat = count > 3 ? std::atoi(values[3]) : 1;
  try {
    edgeprune::VisionSession::Settings settings;
    if (count > 4 && *values[4] != '\0') settings.pruner = pruners::named(values[4]);
    if (count > 5) settings.backend = values[5];
    if (settings.backend == "onnxruntime") settings.threads = 1;
    const edgeprune::VisionSession session(values[1], settings);
    std::vector<Json> requests;
    for (std::string line; std::getline(std::cin, line);) requests.push_back(Json::parse(line));
    std::vector<std::vector<std::string>> lines(static_cast<size_t>(num_threads));
    std::vector<std::thread> threads;
    for (std::vector<std::string>& own : lines) {
      threads.emplace_back([&] {
        for (int time = 0; time < repeat; ++time) {
          own.clear();
          for (const Json& request : requests) own.push_back(answer(session, request));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (size_t index = 0; index < requests.size(); ++index) {
      for (const std::vector<std::string>& own : lines) {
        if (comparable(own[index]) != comparable(lines[0][index])) {
          std::cerr << "threads disagree: " << own[index] << '\n' << lines[0][index] << '\n';
          return 1;
        }
      }
      std::cout << lines[0][index] << '\n';
    }
    return 0;
  } catch (const edgeprune::Exception& error) {
    std::cout << Json({{"error", error.what()}, {"status", error.status()}}).dump() << '\n';
    return 1;
  }
}
