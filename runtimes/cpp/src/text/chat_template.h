// The chat template of a bundle, rendered by minja, a Jinja for chat templates.
#pragma once

#include <map>
#include <memory>
#include <string>

namespace edgeprune {

class ChatTemplate {
 public:
  // Throws BundleError: the template is not valid.
  explicit ChatTemplate(const std::string& source);
  ~ChatTemplate();

  // One message of the user with `num_images` pictures before the text, followed by the beginning of the answer.
  // Throws PromptError: the template refuses the message.
  std::string render(size_t num_images, const std::string& prompt,
                     const std::map<std::string, std::string>& special_tokens) const;

 private:
  struct Parsed;
  std::unique_ptr<Parsed> parsed_;
};

}  // namespace edgeprune
