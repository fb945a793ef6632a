#include "text/deep_stack.h"

#include <pthread.h>

#include <system_error>

namespace edgeprune {
namespace {

void* call(void* function) {
  (*static_cast<const std::function<void()>*>(function))();
  return nullptr;
}

void check(int result) {
  if (result != 0) throw std::system_error(result, std::generic_category(), "a thread cannot be made");
}

struct Attributes {
  pthread_attr_t value;
  explicit Attributes(size_t stack_bytes) {
    check(pthread_attr_init(&value));
    // Memory is taken only as the stack grows.
    pthread_attr_setstacksize(&value, stack_bytes);
  }
  ~Attributes() { pthread_attr_destroy(&value); }
  Attributes(const Attributes&) = delete;
  Attributes& operator=(const Attributes&) = delete;
};

}  // namespace

void on_deep_stack(size_t stack_bytes, const std::function<void()>& function) {
  const Attributes attributes(stack_bytes);
  pthread_t thread;
  check(pthread_create(&thread, &attributes.value, call, const_cast<std::function<void()>*>(&function)));
  check(pthread_join(thread, nullptr));
}

}  // namespace edgeprune
