// Which kernel tables can run here, from cpuid and the registers that the operating system saves.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace gptfast::engine {

namespace isa_scalar { extern const Kernels table; }
#if defined(__x86_64__)
namespace isa_avx2 { extern const Kernels table; }
namespace isa_avx512 { extern const Kernels table; }
namespace isa_avx512_bf16 { extern const Kernels table; }
#endif

const Kernels* kernels(const char* isa) {
  auto is = [&](const char* name) { return !std::strcmp(isa, name); };
  if (is("scalar")) return &isa_scalar::table;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return nullptr;
  if (is("avx2")) return &isa_avx2::table;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return nullptr;
  if (is("avx512")) return &isa_avx512::table;
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) return nullptr;
  if (is("avx512_bf16")) return &isa_avx512_bf16::table;
#endif
  return nullptr;
}

namespace {
struct Scratch {
  void* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch sampler_scratch;
}  // namespace

void* scratch(size_t bytes) {
  Scratch& s = sampler_scratch;
  if (bytes <= s.size) return s.data;
  std::free(s.data);
  s.size = (bytes + 4095) / 4096 * 4096;
  s.data = std::aligned_alloc(4096, s.size);
  if (!s.data) {
    s.size = 0;
    throw std::bad_alloc();
  }
  return s.data;
}

}  // namespace gptfast::engine
