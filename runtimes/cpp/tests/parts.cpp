// Parts of the library, one by one, for comparison with Python's: requests and results are lines of JSON.
//
// parts tokenize FILE | render | sample | preprocess | picture | halves
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include "bundle/json_object.h"
#include "decoder/sampling.h"
#include "error.h"
#include "pictures/picture_file.h"
#include "pictures/preprocessing.h"
#include "text/chat_template.h"
#include "text/incremental_decoder.h"
#include "text/tokenizer.h"

namespace {

using edgeprune::Json;

Json tokenized(const edgeprune::Tokenizer& tokenizer, const Json& request) {
  Json ids = Json::array(), offsets = Json::array(), pieces = Json::array();
  std::vector<int64_t> numbers;
  for (const edgeprune::Token& token : tokenizer.encode(request["text"].get<std::string>(), request["special"].get<bool>())) {
    ids.push_back(token.id);
    offsets.push_back({token.span.begin, token.span.end});
    numbers.push_back(token.id);
  }
  if (request.contains("ids")) numbers = request["ids"].get<std::vector<int64_t>>();
  edgeprune::IncrementalDecoder incremental(tokenizer);
  for (const int64_t id : numbers) pieces.push_back(incremental.push(id));
  pieces.push_back(incremental.finish());
  return {{"ids", ids}, {"offsets", offsets}, {"text", tokenizer.decode(numbers)}, {"pieces", pieces}};
}

Json rendered(const Json& request) {
  const edgeprune::ChatTemplate chat(request["template"].get<std::string>());
  return chat.render(request["images"].get<size_t>(), request["prompt"].get<std::string>(),
                     request["special"].get<std::map<std::string, std::string>>());
}

Json sampled(const Json& request) {
  edgeprune::SamplingOptions options;
  options.temperature = request["temperature"].get<double>();
  options.top_k = request["top_k"].get<int64_t>();
  options.top_p = request["top_p"].get<double>();
  options.seed = request["seed"].get<uint64_t>();
  options.check();
  edgeprune::TokenSampler sampler(options);
  Json tokens = Json::array();
  for (const Json& row : request["logits"]) {
    const auto values = row.get<std::vector<float>>();
    tokens.push_back(sampler.choose(edgeprune::float32_tensor(values, {1, static_cast<int64_t>(values.size())})));
  }
  return tokens;
}

void write_raw(const std::string& path, const void* data, size_t bytes) {
  std::ofstream(path, std::ios::binary).write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
}

Json prepared(const Json& request) {
  std::vector<edgeprune::Picture> pictures;
  for (const Json& path : request["images"]) pictures.push_back(edgeprune::read_picture(path.get<std::string>()));
  const auto preprocessing = edgeprune::preprocessing_from_json(request["settings"]);
  const edgeprune::PreparedPictures made =
      preprocessing->prepare(pictures, request["grid"][0].get<int64_t>(), request["grid"][1].get<int64_t>());
  Json inputs = Json::object(), grids = Json::array(), places = Json::array();
  for (const auto& [name, tensor] : made.inputs) {
    const std::string path = request["folder"].get<std::string>() + "/" + name;
    write_raw(path, tensor.address, tensor.bytes());
    inputs[name] = tensor.shape;
  }
  for (const edgeprune::VisualGrid& grid : made.layout.grids()) {
    grids.push_back({grid.image, grid.rows, grid.columns, grid.box, grid.overview});
  }
  for (const edgeprune::VisualPlace& place : made.layout.places()) places.push_back({place.grid, place.row, place.column});
  Json result = {{"inputs", inputs}, {"grids", grids}, {"places", places}, {"slots", made.layout.slots()}};
  result["tokens_per_image"] = made.layout.tokens_per_image();
  result["table"] = made.layout.table();
  if (request.contains("split")) result["split"] = made.layout.split_over_grids(request["split"].get<std::vector<int64_t>>());
  if (request.contains("patch_slots")) {
    const auto slots = request["patch_slots"].get<std::vector<int64_t>>();
    const auto counts = request["counts"].is_null() ? std::vector<int64_t>() : request["counts"].get<std::vector<int64_t>>();
    const edgeprune::FeatureRows rows = made.layout.rows_of(slots, request["counts"].is_null() ? nullptr : &counts);
    result["rows"] = rows.rows;
    result["rows_per_image"] = rows.tokens_per_image;
  }
  return result;
}

Json picture(const Json& request) {
  edgeprune::Picture read;
  if (request.contains("pixels")) {
    const auto pixels = request["pixels"].get<std::vector<uint8_t>>();
    const auto size = request["size"].get<std::vector<int64_t>>();
    read = edgeprune::picture_from_pixels(pixels.data(), size[0], size[1], size[2], size[0] * size[2]);
  } else {
    read = edgeprune::read_picture(request["path"].get<std::string>());
  }
  if (request.contains("resize")) {
    read = edgeprune::resized(read, request["resize"][0].get<int64_t>(), request["resize"][1].get<int64_t>(),
                              *edgeprune::resampling(request["resample"].get<std::string>()));
  }
  write_raw(request["target"].get<std::string>(), read.pixels.data(), read.pixels.size());
  return {read.width, read.height};
}

Json halves(const Json& request) {
  Json bits = Json::array();
  for (const Json& value : request) bits.push_back(edgeprune::half_from_float(value.get<float>()));
  return bits;
}

}  // namespace

int main(int count, char** values) {
  const std::string part = count > 1 ? values[1] : "";
  std::optional<edgeprune::Tokenizer> tokenizer;
  try {
    if (part == "tokenize") {
      std::ifstream file(values[2], std::ios::binary);
      tokenizer.emplace(std::string(std::istreambuf_iterator<char>(file), {}));
    }
  } catch (const std::invalid_argument& error) {
    std::cout << Json({{"error", error.what()}}).dump() << '\n';
    return 1;
  }
  for (std::string line; std::getline(std::cin, line);) {
    Json result;
    try {
      const Json request = edgeprune::parse_json(line);
      if (part == "tokenize") result = tokenized(*tokenizer, request);
      if (part == "render") result = rendered(request);
      if (part == "sample") result = sampled(request);
      if (part == "preprocess") result = prepared(request);
      if (part == "picture") result = picture(request);
      if (part == "halves") result = halves(request);
    } catch (const edgeprune::Error& error) {
      result = {{"error", error.what()}};
    }
    std::cout << result.dump(-1, ' ', false, Json::error_handler_t::replace) << '\n';
  }
  return 0;
}
