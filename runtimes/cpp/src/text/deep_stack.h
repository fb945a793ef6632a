// Runs a function on a thread with a large stack, for libraries that recur with their input.
#pragma once

#include <cstddef>
#include <functional>

namespace edgeprune {

// The function must not throw. Throws std::system_error: the thread cannot be made.
void on_deep_stack(size_t stack_bytes, const std::function<void()>& function);

}  // namespace edgeprune
