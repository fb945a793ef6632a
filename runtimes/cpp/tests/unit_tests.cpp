// What needs no bundle and no Python: published test vectors, edges, hostile input.
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bundle/json_object.h"
#include "bundle/sha256.h"
#include "decoder/eviction.h"
#include "decoder/stop_matcher.h"
#include "error.h"
#include "numbers.h"
#include "pictures/picture_file.h"
#include "tensor.h"
#include "tensorrt/device_arena.h"
#include "tensorrt/engine_choice.h"
#include "tensorrt/upload_staging.h"
#include "text/chat_template.h"
#include "text/regex.h"
#include "text/tokenizer.h"
#include "text/unicode.h"

namespace {

using namespace edgeprune;

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

template <typename Kind>
void expect_thrown(const std::function<void()>& body, const std::string& part) {
  try {
    body();
  } catch (const Kind& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, std::string("another message: ") + error.what());
    return;
  }
  throw std::runtime_error("nothing was thrown, expected: " + part);
}

std::string sha256(const std::string& text) {
  Sha256 digest;
  digest.add(text.data(), text.size());
  return digest.finish();
}

// FIPS 180-4's examples, and lengths around a block.
void sha256_gives_the_published_digests() {
  expect(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "abc");
  expect(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "nothing");
  expect(sha256("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
             "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
         "two blocks");
  expect(sha256(std::string(1000000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", "a million");
}

// Where the processor has no instructions for it, both are the same code.
void sha256_by_instructions_is_sha256_in_plain_code() {
  std::string bytes;
  for (int i = 0; i < 64 * 40; ++i) bytes += static_cast<char>((i * i + 7 * i) >> 3);
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  sha256::State fast = sha256::first_state(), plain = sha256::first_state();
  for (size_t count = 0; count < 9; ++count) {
    sha256::add_blocks(fast, data + 64 * count, count);
    sha256::add_blocks_portably(plain, data + 64 * count, count);
    expect(fast == plain, std::to_string(count) + " blocks");
  }
}

void numbers_round_as_python_rounds() {
  expect(rounded_to(0.29 * 100, 6) == 29.0, "0.29 of 100");
  expect(rounded_to(2.5, 0) == 2.0 && rounded_to(1e300, 7) == 1e300, "halves and huge numbers");
  expect(floor_divided(-3, 2) == -2 && floor_divided(3, 2) == 1 && floor_divided(-4, 2) == -2, "towards minus infinity");
}

void a_view_beyond_its_tensor_is_refused() {
  const Tensor tensor = zero_tensor({2, 3}, DataType::int64);
  expect(tensor.view({3}, 3).data<int64_t>() == tensor.data<int64_t>() + 3, "offset");
  expect_thrown<std::out_of_range>([&] { tensor.view({4}, 3); }, "fit");
  expect_thrown<std::length_error>([] { host_tensor({-1}, DataType::int64); }, "negative");
  expect_thrown<std::length_error>([] { host_tensor({int64_t{1} << 62, 4}, DataType::int64); }, "large");
}

void stop_texts_are_found_over_pieces() {
  StopMatcher matcher({"END", "NO"});
  expect(matcher.push("the E") == std::make_pair(std::string("the "), false), "withheld");
  expect(matcher.push("x N") == std::make_pair(std::string("Ex "), false), "given free");
  expect(matcher.push("O more") == std::make_pair(std::string(), true), "found");
  expect(matcher.push("x").second && matcher.finish().empty(), "nothing behind it");
}

void a_rate_that_grows_drops_the_least_important() {
  Eviction eviction({-1, 0, 2, 1, 3, -1}, 4, 4);
  expect(!eviction.rows_to_keep(0, 7, 1).has_value(), "rate 0");
  expect(eviction.rows_to_keep(2, 7, 2) == std::vector<int64_t>({0, 1, 3, 5, 6}), "half of them");
  expect(!eviction.rows_to_keep(1, 6, 3).has_value(), "the rate never falls");
}

void utf8_is_checked_by_the_standard() {
  expect(is_utf8("a\xC3\xA9\xF0\x9F\x99\x82"), "valid");
  for (const char* wrong : {"\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE2\x82", "\x80", "\xF5\x80\x80\x80"}) {
    expect(!is_utf8(wrong), "invalid");
  }
  // Unicode, table 3-8.
  expect(utf8_lossy("\xF0\x80\x80\x41") == "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\x41", "one for each");
  expect(utf8_lossy("\xF0\x9F\x99\x41") == "\xEF\xBF\xBD\x41", "one for the longest beginning");
}

void regular_expressions_match_what_tokenizers_mean() {
  const auto found = [](const char* pattern, const char* text) {
    const auto match = Regex(pattern).find(code_points(text), 0);
    return match ? utf8(code_points(text).substr(match->first, match->second - match->first)) : "-";
  };
  expect(found(R"(\s+(?!\S)|\s+)", "a   b") == "  ", "lookahead gives one back");
  expect(found("(?i:'ll|'s)", "I'LL") == "'LL", "case");
  expect(found(R"([^\r\n\p{L}\p{N}]?\p{L}+)", "42 Größe") == " Größe", "properties");
  expect(found(R"(\p{N}{1,3})", "12345") == "123", "counted");
  expect(found("a?+a", "a") == "-", "possessive gives nothing back");
  expect(found("[a-c]+", "xabcd") == "abc", "range");
  for (const char* wrong : {"a*?", "(?<=a)b", "\\w", ".", "[[:alpha:]]", "(a*)*", "\\p{Lu}", "a{2,1}", "(a", "a)", "[a", "\\", "+"}) {
    expect_thrown<std::invalid_argument>([&] { Regex{wrong}; }, "not supported");
  }
  expect_thrown<std::invalid_argument>([] { Regex{std::string(100000, '(')}; }, "too many groups");
  expect_thrown<std::invalid_argument>([] { Regex{"((a{1000}){1000}){1000}"}; }, "too many repetitions");
  expect(found(("(a|aa)+b"), std::string(28, 'a').c_str()) == "-", "a hard search ends");
  expect_thrown<std::runtime_error>([&] { found("(a|aa)+b", std::string(200, 'a').c_str()); }, "too long");
}

void unknown_tokenizer_parts_are_refused_by_name() {
  const auto refused = [](const char* json, const char* part) {
    expect_thrown<std::invalid_argument>([&] { Tokenizer{std::string(json)}; }, part);
  };
  refused("", "parse");
  refused("[]", "no object");
  refused("{}", "no model");
  refused(R"({"model": {"type": "Unigram", "vocab": []}})", "'Unigram'");
  refused(R"({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}})", "merge 'a b'");
  refused(R"({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}})", "no usable id");
  refused(R"({"model": {"vocab": {}, "merges": []}, "normalizer": {"type": "NFKC"}})", "'NFKC'");
  refused(R"({"model": {"vocab": {}, "merges": []}, "pre_tokenizer": {"type": "BertPreTokenizer"}})", "'BertPreTokenizer'");
  refused(R"({"model": {"vocab": {}, "merges": []}, "decoder": {"type": "CTC"}})", "'CTC'");
  refused(R"({"model": {"vocab": {}, "merges": []}, "post_processor": {"type": "BertProcessing"}})", "'BertProcessing'");
  refused((std::string(1000, '[') + std::string(1000, ']')).c_str(), "deep");
  // Found by fuzzing: numbers that no integer holds, and null, which is no component elsewhere.
  refused(R"({"model": {"vocab": {"a": 1e308}, "merges": []}})", "no usable id");
  refused(R"({"model": {"vocab": {}, "merges": []}, "added_tokens": [{"id": 1e308, "content": "a"}]})", "no usable id");
  refused(R"({"model": {"vocab": {}, "merges": []}, "post_processor": {"type": "RobertaProcessing", "cls": ["a", 0],
              "sep": ["b", 1e308], "trim_offsets": true, "add_prefix_space": true}})",
          "no usable id");
  refused(R"({"model": {"vocab": {}, "merges": []}, "decoder": {"type": "Strip", "content": " ", "start": -1, "stop": 0}})",
          "no usable number");
  const std::pair<const char*, const char*> sequences[] = {
      {"normalizer", "normalizers"}, {"pre_tokenizer", "pretokenizers"}, {"post_processor", "processors"}, {"decoder", "decoders"}};
  for (const auto& [part, list] : sequences) {
    const std::string null_part = std::string(R"({"model": {"vocab": {}, "merges": []}, ")") + part + R"(": {"type": "Sequence", ")" +
                                  list + R"(": [null]}})";
    refused(null_part.c_str(), "is null");
  }
}

void hostile_templates_are_refused() {
  const auto refused = [](const std::string& source) { expect_thrown<BundleError>([&] { ChatTemplate{source}; }, "chat template"); };
  refused("{% if %}");
  refused("{{ " + std::string(30000, '(') + "1");
  refused(std::string(70000, 'x'));
  const ChatTemplate endless("{% for i in range(1000000000000) %}x{% endfor %}");
  expect_thrown<PromptError>([&] { endless.render(0, "?", {}); }, "range");
  const ChatTemplate raising("{{ raise_exception('no pictures') }}");
  expect_thrown<PromptError>([&] { raising.render(1, "?", {}); }, "no pictures");
  expect(ChatTemplate(std::string(60000, 'x')).render(0, "?", {}).size() == 60000, "a long one");
}

void damaged_pictures_are_refused() {
  const auto refused = [](const std::string& bytes, const char* part) {
    expect_thrown<PictureError>([&] { decode_picture(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()); }, part);
  };
  refused("", "not a picture");
  refused("GIF89a", "not a picture");
  refused("\x89PNG\r\n\x1A\n", "cut short");
  refused(std::string("\x89PNG\r\n\x1A\n\xFF\xFF\xFF\xFFIHDR", 16), "cut short");
  refused("\xFF\xD8\xFF\xE0", "JPEG");
}

void deep_or_wrong_json_is_refused() {
  expect_thrown<std::invalid_argument>([] { parse_json(std::string(100000, '[')); }, "deep");
  expect_thrown<std::invalid_argument>([] { parse_json("{\"a\": nan}"); }, "parse");
  const Json data = parse_json(R"({"a": 1.5, "b": 99999999999999999999, "c": true})");
  const JsonObject object(data, "place", {"a", "b", "c"});
  for (const char* name : {"a", "b", "c"}) expect_thrown<BundleError>([&] { object.integer(name); }, "expected int");
}

// The sizes are those that edgeprune.runtimes.device_arena gives.
void device_memory_is_used_again() {
  const std::vector<std::pair<size_t, size_t>> sizes = {{0, 256},     {256, 256},       {257, 512},
                                                        {5000, 5120}, {100000, 106496}, {3000001, 3145728}};
  for (const auto& [size, block] : sizes) expect(block_bytes(size) == block, std::to_string(size));
  size_t used = 0, mallocs = 0;
  std::map<void*, size_t> blocks;
  const auto malloc = [&](size_t size) -> void* {
    if (used + size > 1024) return nullptr;
    used += size;
    void* address = reinterpret_cast<void*>(++mallocs << 12);
    blocks[address] = size;
    return address;
  };
  const auto free = [&](void* address) { used -= blocks.at(address); };
  {
    const auto pool = std::make_shared<MemoryPool>(malloc, free);
    const void* first = pool->allocate(200).get();
    expect(pool->allocate(250).get() == first && mallocs == 1, "a block that came back is used again");
    const auto held = pool->allocate(512);
    // 256 are unused in another size, and this needs them.
    const auto other = pool->allocate(512);
    expect(used == 1024 && mallocs == 3, "what is unused in other sizes is freed");
    expect_thrown<BackendError>([&] { pool->allocate(1); }, "the GPU has no 1 MiB left");
  }
  expect(used == 0, "a pool frees what it holds");
  const auto pool = std::make_shared<MemoryPool>(malloc, free);
  Arena arena(pool);
  arena.reserve(300);
  const void* small = arena.block().get();
  arena.reserve(200);
  expect(arena.block().get() == small && arena.size() == 512, "the arena is what the hungriest engine needs");
  arena.reserve(600);
  expect(arena.block().get() != small && arena.size() == 768, "it grows when a hungrier one comes");
}

void uploads_take_no_memory_that_waits_to_be_copied() {
  UploadStaging staging(10);
  expect(staging.place(4) == 0u && staging.place(6) == 4u && staging.place(0) == 10u, "places follow each other");
  expect(!staging.place(1) && !staging.place(~size_t{0}), "a full buffer");
  uint64_t mark = staging.mark();
  staging.release(mark);
  expect(staging.place(4) == 0u, "after a wait all is free");
  mark = staging.mark();
  staging.place(4);
  staging.release(mark);
  expect(!staging.place(4), "what was placed during a wait keeps its place");
}

void engines_run_with_the_version_that_built_them() {
  expect(is_version("10.3.0.26", "10.3.0") && is_version("10.3.0.26", "10.3.0.26"), "equal");
  for (const char* other : {"10.3.0.27", "10.3.1", "1", "10.3.0.26.1", ""}) expect(!is_version("10.3.0.26", other), other);
}

void the_smallest_profile_that_fits_is_chosen() {
  const std::vector<ProfileEntry> profiles = {{"all", {{"sequence", {1, 64, 512}}, {"past", {0, 0, 512}}}},
                                              {"prefill", {{"sequence", {1, 64, 512}}, {"past", {0, 0, 0}}}},
                                              {"decode", {{"sequence", {1, 1, 2}}, {"past", {1, 64, 512}}}}};
  expect(choose_profile("segment0", profiles, {{"sequence", 100}, {"past", 0}}) == 1, "prefill");
  expect(choose_profile("segment0", profiles, {{"sequence", 1}, {"past", 100}}) == 2, "decode");
  expect(choose_profile("segment0", profiles, {{"sequence", 5}, {"past", 100}}) == 0, "neither");
  expect_thrown<BackendError>([&] { choose_profile("segment0", profiles, {{"sequence", 513}, {"past", 0}}); },
                              "segment0: sequence is 513, the engine was built for 1 … 512 or 1 … 2: build with a larger --max-sequence");
  expect_thrown<BackendError>([&] { choose_profile("vision", {{"all", {{"tiles", {1, 1, 4}}}}}, {{"tiles", 9}}); },
                              "a larger --max-images");
  expect_thrown<BackendError>([&] { choose_profile("vision", profiles, {{"tiles", 9}}); }, "are not those of the graph");
}

}  // namespace

int main() {
  const std::vector<std::pair<const char*, void (*)()>> tests = {
      {"sha256 gives the published digests", sha256_gives_the_published_digests},
      {"sha256 by instructions is sha256 in plain code", sha256_by_instructions_is_sha256_in_plain_code},
      {"numbers round as Python rounds", numbers_round_as_python_rounds},
      {"a view beyond its tensor is refused", a_view_beyond_its_tensor_is_refused},
      {"stop texts are found over pieces", stop_texts_are_found_over_pieces},
      {"a rate that grows drops the least important", a_rate_that_grows_drops_the_least_important},
      {"UTF-8 is checked by the standard", utf8_is_checked_by_the_standard},
      {"regular expressions match what tokenizers mean", regular_expressions_match_what_tokenizers_mean},
      {"unknown tokenizer parts are refused by name", unknown_tokenizer_parts_are_refused_by_name},
      {"hostile templates are refused", hostile_templates_are_refused},
      {"damaged pictures are refused", damaged_pictures_are_refused},
      {"deep or wrong JSON is refused", deep_or_wrong_json_is_refused},
      {"device memory is used again", device_memory_is_used_again},
      {"uploads take no memory that waits to be copied", uploads_take_no_memory_that_waits_to_be_copied},
      {"engines run with the version that built them", engines_run_with_the_version_that_built_them},
      {"the smallest profile that fits is chosen", the_smallest_profile_that_fits_is_chosen},
  };
  int failed = 0;
  for (const auto& [name, test] : tests) {
    try {
      test();
      std::printf("ok      %s\n", name);
    } catch (const std::exception& error) {
      std::printf("FAILED  %s: %s\n", name, error.what());
      ++failed;
    }
  }
  return failed == 0 ? 0 : 1;
}
