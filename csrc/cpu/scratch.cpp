// Scratch memory of a thread, for the kernels of csrc/cpu and csrc/engine.
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace gptfast::cpu {
namespace {

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
  void* get(size_t bytes) {
    if (bytes <= size) return data;
    std::free(data);
    size = (bytes + 4095) / 4096 * 4096;
    data = std::aligned_alloc(4096, size);
    if (!data) {
      size = 0;
      throw std::bad_alloc();
    }
    return data;
  }
};
thread_local Scratch thread_scratch, thread_workspace;

}  // namespace

void* scratch(size_t bytes) { return thread_scratch.get(bytes); }
void* workspace(size_t bytes) { return thread_workspace.get(bytes); }

}  // namespace gptfast::cpu
