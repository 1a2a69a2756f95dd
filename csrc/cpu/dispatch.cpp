// Chooses the kernel table once, from cpuid and the operating system's saved register state.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace gptfast::cpu {

namespace isa_scalar { extern const Kernels table; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const Kernels table; }
namespace isa_avx512 { extern const Kernels table; }
namespace isa_avx512_bf16 { extern const Kernels table; }
#endif

namespace {

struct Available {
  const Kernels* tables[4];
  const char* names[4];
  int count = 0;
  void add(const Kernels& k) {
    tables[count] = &k;
    names[count++] = k.isa;
  }
  Available() {
    add(isa_scalar::table);
#if defined(__x86_64__)
    // __builtin_cpu_supports also checks with xgetbv that the system saves the wide registers.
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return;
    add(isa_avx2::table);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
      return;
    add(isa_avx512::table);
    if (__builtin_cpu_supports("avx512bf16")) add(isa_avx512_bf16::table);
#endif
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; i++)
      if (!std::strcmp(names[i], name)) return tables[i];
    return nullptr;
  }
};

const Available& available() {
  static const Available a;
  return a;
}

const Kernels* default_table() {
  const char* wanted = std::getenv("GPTFAST_CPU_ISA");
  if (wanted && *wanted)
    if (const Kernels* k = available().find(wanted)) return k;
  return available().tables[available().count - 1];
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{default_table()};
  return table;
}

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

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const char* const* available_isas(int* count) {
  *count = available().count;
  return available().names;
}

bool set_isa(const char* name) {
  const Kernels* k = name ? available().find(name) : default_table();
  if (!k) return false;
  current().store(k);
  return true;
}

const char* rejected_isa() {
  const char* wanted = std::getenv("GPTFAST_CPU_ISA");
  return wanted && *wanted && !available().find(wanted) ? wanted : nullptr;
}

void* scratch(size_t bytes) { return thread_scratch.get(bytes); }
void* workspace(size_t bytes) { return thread_workspace.get(bytes); }

}  // namespace gptfast::cpu
