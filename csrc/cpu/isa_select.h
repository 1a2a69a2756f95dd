// The instruction sets that kernels are compiled for, and which of them can run here; for csrc/cpu and csrc/engine.
#pragma once
#include <cstring>

namespace gptfast::cpu {

// Worst first. The build reads this line, and has the compiler's flags of each (buildtools/libraries.py).
#if defined(__x86_64__)
#define GPTFAST_ISAS(X) X(scalar) X(avx2) X(avx512) X(avx512_bf16)
#else
#define GPTFAST_ISAS(X) X(scalar)
#endif

// Whether this CPU has the instructions and the operating system saves the registers (__builtin_cpu_supports asks xgetbv).
inline bool can_run(const char* isa) {
  const auto is = [isa](const char* name) { return !std::strcmp(isa, name); };
  if (is("scalar")) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (is("avx2")) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is("avx512")) return avx512;
  if (is("avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  return false;
}

}  // namespace gptfast::cpu
