// Any bytes as manifest.json: the manifest, the settings of its pictures and its prompt are read, or refused.
#include <algorithm>
#include <cstdlib>

#include "bundle/manifest.h"
#include "error.h"
#include "json_mutation.h"
#include "pictures/preprocessing.h"
#include "text/prompt.h"

namespace {

// Where a file of the bundle would be looked for outside of it.
bool leaves(const std::string& path) {
  const std::filesystem::path lexical = std::filesystem::path(path).lexically_normal();
  return lexical.is_absolute() || (!lexical.empty() && *lexical.begin() == "..");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const edgeprune::Manifest manifest =
        edgeprune::manifest_from_text(std::string(reinterpret_cast<const char*>(data), size), "manifest.json");
    for (const edgeprune::FileEntry& file : manifest.files()) {
      if (leaves(file.path) || file.bytes < 0) std::abort();
    }
    edgeprune::preprocessing_from_json(manifest.preprocessing);
    edgeprune::PromptFormat::from_json(manifest.prompt);
  } catch (const edgeprune::BundleError&) {
    // What every manifest gets that is none.
  }
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  edgeprune::fuzz::Random random(seed);
  const std::string changed = edgeprune::fuzz::mutated_json(std::string(reinterpret_cast<const char*>(data), size), random);
  if (changed.size() > most) return LLVMFuzzerMutate(data, size, most);
  std::copy(changed.begin(), changed.end(), data);
  return changed.size();
}
