// GPTFAST_BOX(&f): f as torch's dispatcher calls it.
//
// An error of f leaves it as an exception, through frames of torch. Where the library has a C++ runtime of its own, as zig's
// compiler links it into the wheels for Linux, it cannot pass those frames, which are of libstdc++, and the process aborts.
// There the message goes to torch, and torch throws: `boxed` has nothing to clean up, so its frame asks no runtime.
#pragma once
#include <torch/csrc/stable/library.h>

#if defined(_LIBCPP_VERSION) && defined(__linux__)
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>

namespace c10::detail {
[[noreturn]] void torchCheckFail(const char* function, const char* file, uint32_t line, const char* message);
}

namespace gptfast {

template <class Box>
__attribute__((noinline)) const char* message_of(StableIValue* stack, uint64_t inputs, uint64_t outputs) noexcept {
  static thread_local std::string message;
  try {
    Box::boxed_fn(stack, inputs, outputs);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
    message = "an exception that is no std::exception";
  }
  return message.c_str();
}
template <class Box> void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if (const char* message = message_of<Box>(stack, inputs, outputs)) c10::detail::torchCheckFail("", "", 0, message);
}

}  // namespace gptfast

#define GPTFAST_BOX(func) \
  (&::gptfast::boxed<     \
      torch::stable::detail::boxer<std::remove_pointer_t<std::remove_reference_t<decltype(func)>>, (func)>>)
#else
#define GPTFAST_BOX(func) TORCH_BOX(func)
#endif
