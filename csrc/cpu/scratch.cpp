// Scratch memory of a thread, for the kernels of csrc/cpu and csrc/engine.
#include <utility>

#include "kernels.h"
#include "system.h"

namespace gptfast::cpu {
namespace {

struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { free_aligned(data); }
  void* get(size_t bytes) {
    if (bytes <= size) return data;
    free_aligned(std::exchange(data, nullptr));
    size = 0;
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    data = allocate_aligned(4096, whole);
    size = whole;
    return data;
  }
};
thread_local Scratch thread_scratch, thread_workspace;

}  // namespace

void* scratch(size_t bytes) { return thread_scratch.get(bytes); }
void* workspace(size_t bytes) { return thread_workspace.get(bytes); }

}  // namespace gptfast::cpu
