// edgeprune-run: answers a question about pictures with a bundle, as `edgeprune run` does.
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgeprune/edgeprune.hpp"

namespace {

constexpr const char* kUsage = R"(Usage: edgeprune-run [OPTIONS] BUNDLE

  Answer a question about pictures with BUNDLE.

Options:
  --image PATH              A picture, PNG or JPEG; repeatable.
  --prompt TEXT             The question.  [required]
  --max-new-tokens INTEGER  Most tokens to generate.  [default: 64]
  --temperature FLOAT       0 takes the most likely token.  [default: 0.0]
  --top-k INTEGER           Draw from the k most likely tokens; 0 = all.  [default: 0]
  --top-p FLOAT             Draw from the smallest set with this probability.  [default: 1.0]
  --seed INTEGER            Seed of the draws.
  --stop TEXT               Text that ends the answer; repeatable.
  --stream                  Print the answer while it is generated.
  --json                    Print text, token ids, kept tokens and timings as JSON.
  --backend TEXT            onnxruntime, or tensorrt with the engines of edgeprune build.  [default: onnxruntime]
  --provider TEXT           Of ONNX Runtime: cpu or cuda.  [default: cpu]
  --threads INTEGER         Of ONNX Runtime: threads of an operator.
  --runtime-library PATH    The backend's library, if not where the linker, EDGEPRUNE_ONNXRUNTIME or EDGEPRUNE_TENSORRT
                            says.
  --version                 Show the version and exit.
  -h, --help                Show this message and exit.
)";

struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string bundle;
  std::vector<std::string> images;
  std::string prompt;
  bool has_prompt = false;
  edgeprune::Options options;
  edgeprune::VisionSession::Settings settings;
  bool stream = false;
  bool json = false;
};

template <typename Number, typename Reader>
Number number(const std::string& option, const std::string& text, Reader read) {
  try {
    size_t used = 0;
    const Number value = read(text, &used);
    if (used == text.size()) return value;
  } catch (const std::logic_error&) {
    // Said below.
  }
  throw UsageError("Invalid value for '" + option + "': '" + text + "' is not a valid number.");
}

int64_t integer(const std::string& option, const std::string& text) {
  return number<int64_t>(option, text, [](const std::string& digits, size_t* used) { return std::stoll(digits, used); });
}

double real(const std::string& option, const std::string& text) {
  return number<double>(option, text, [](const std::string& digits, size_t* used) { return std::stod(digits, used); });
}

uint64_t seed(const std::string& option, const std::string& text) {
  if (!text.empty() && text.front() == '-') throw UsageError("Invalid value for '" + option + "': it must be at least 0.");
  return number<uint64_t>(option, text, [](const std::string& digits, size_t* used) { return std::stoull(digits, used); });
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments found;
  for (size_t at = 0; at < words.size(); ++at) {
    std::string word = words[at], inline_value;
    const size_t equals = word.rfind("--", 0) == 0 ? word.find('=') : std::string::npos;
    const bool has_inline = equals != std::string::npos;
    if (has_inline) inline_value = word.substr(equals + 1), word = word.substr(0, equals);
    const auto value = [&]() -> std::string {
      if (has_inline) return inline_value;
      if (at + 1 >= words.size()) throw UsageError("Option '" + word + "' requires an argument.");
      return words[++at];
    };
    if (word == "--image") {
      found.images.push_back(value());
    } else if (word == "--prompt") {
      found.prompt = value(), found.has_prompt = true;
    } else if (word == "--max-new-tokens") {
      found.options.max_new_tokens = integer(word, value());
    } else if (word == "--temperature") {
      found.options.temperature = real(word, value());
    } else if (word == "--top-k") {
      found.options.top_k = integer(word, value());
    } else if (word == "--top-p") {
      found.options.top_p = real(word, value());
    } else if (word == "--seed") {
      found.options.seed = seed(word, value());
    } else if (word == "--stop") {
      found.options.stop.push_back(value());
    } else if (word == "--stream") {
      found.stream = true;
    } else if (word == "--json") {
      found.json = true;
    } else if (word == "--backend") {
      found.settings.backend = value();
    } else if (word == "--provider") {
      found.settings.provider = value();
    } else if (word == "--threads") {
      found.settings.threads = static_cast<int>(integer(word, value()));
    } else if (word == "--runtime-library") {
      found.settings.runtime_library = value();
    } else if (word.size() > 1 && word.front() == '-') {
      throw UsageError("No such option: " + word);
    } else if (found.bundle.empty()) {
      found.bundle = word;
    } else {
      throw UsageError("Got unexpected extra argument (" + word + ")");
    }
  }
  if (found.bundle.empty()) throw UsageError("Missing argument 'BUNDLE'.");
  if (!found.has_prompt) throw UsageError("Missing option '--prompt'.");
  return found;
}

std::string without_leading_space(const std::string& text) {
  const size_t start = text.find_first_not_of(" \t\n\v\f\r");
  return start == std::string::npos ? "" : text.substr(start);
}

void report(const edgeprune::Reply& reply) {
  for (const edgeprune::Site& site : reply.sites()) {
    std::fprintf(stderr, "%s, %s: %lld of %lld visual tokens kept\n", site.name.c_str(), site.place.c_str(),
                 static_cast<long long>(site.kept), static_cast<long long>(site.tokens_in));
  }
  for (const edgeprune::Site& site : reply.sites()) {
    for (const auto& [generated, left] : site.evictions) {
      std::fprintf(stderr, "%s: %lld visual tokens left after %lld generated tokens\n", site.name.c_str(),
                   static_cast<long long>(left), static_cast<long long>(generated));
    }
  }
  double prefill = 0;
  for (const auto& [name, milliseconds] : reply.timings_ms()) {
    for (const char* stage : {"prefill.", "select.", "gather."}) {
      if (name.rfind(stage, 0) == 0) prefill += milliseconds;
    }
  }
  const double decode = reply.timing_ms("decode");
  std::fprintf(stderr,
               "%lld prompt tokens; vision %.1f ms, prefill %.1f ms, first token %.1f ms, decode %.0f tokens/s\n",
               static_cast<long long>(reply.prompt_tokens()), reply.timing_ms("vision"), prefill,
               reply.timing_ms("time_to_first_token"),
               decode > 0 ? 1000 * static_cast<double>(reply.decode_steps()) / decode : 0.0);
}

void run(const Arguments& arguments) {
  const edgeprune::VisionSession session(arguments.bundle, arguments.settings);
  std::vector<edgeprune::Image> images;
  for (const std::string& path : arguments.images) images.push_back(edgeprune::Image::read(path));
  bool begun = false;
  edgeprune::OnPiece show;
  if (arguments.stream && !arguments.json) {
    show = [&begun](std::string_view piece) {
      // The first word's space belongs between prompt and answer.
      const std::string shown = begun ? std::string(piece) : without_leading_space(std::string(piece));
      begun = begun || !shown.empty();
      std::cout << shown << std::flush;
      return true;
    };
  }
  const edgeprune::Reply reply = session.ask(images, arguments.prompt, arguments.options, show);
  if (arguments.json) {
    std::cout << reply.json() << '\n';
    return;
  }
  std::cout << (arguments.stream ? "" : without_leading_space(reply.text())) << std::endl;
  report(reply);
}

}  // namespace

int main(int count, char** values) {
  // The library tells ONNX Runtime to report nothing; told before it is loaded, it does not even prepare to.
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  const std::vector<std::string> words(values + 1, values + count);
  for (const std::string& word : words) {
    if (word == "-h" || word == "--help") {
      std::cout << kUsage;
      return 0;
    }
    if (word == "--version") {
      std::cout << "edgeprune, version " << edgeprune_version() << '\n';
      return 0;
    }
  }
  try {
    run(parse(words));
    return 0;
  } catch (const UsageError& error) {
    std::cerr << "Usage: edgeprune-run [OPTIONS] BUNDLE\nTry 'edgeprune-run --help' for help.\n\nError: " << error.what() << '\n';
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "edgeprune: " << error.what() << '\n';
    return 1;
  }
}
