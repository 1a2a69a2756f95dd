// The instruction sets that kernels are compiled for, and which of them can run here; for csrc/cpu and csrc/engine.
#pragma once
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace gptfast::cpu {

// Worst first. PART(isa, base): one that has some kernels of its own, listed below, and all others of `base`. The build reads
// these lines, and has the compiler's flags of each (buildtools/libraries.py).
// clang-format off
#if defined(__x86_64__)
#define GPTFAST_ISAS(X, PART) X(scalar) X(avx2) X(avx512) PART(avx512_bf16, avx512) PART(amx, avx512_bf16)
// Those that round to bf16, multiply pairs of it or sum bytes. The rest is avx512's.
#define GPTFAST_CPU_avx512_bf16(X) \
  X(sum_chunks) X(peak) X(gelu_fwd) X(gelu_bwd) X(tile_product_pairs) X(gemm) X(gemm_few) X(gemm_narrow) X(quantized_pack) \
  X(quantized_rows) X(causal_attention_fwd) X(causal_attention_bwd) X(dropout) X(relu_squared) X(swiglu) X(rotary) \
  X(layer_norm_fwd) X(layer_norm_bwd) X(cross_entropy) X(embedding)
#define GPTFAST_ENGINE_avx512_bf16(X) \
  X(product_float) X(product_bytes) X(product_small) X(product_mxfp4) X(rows) X(attention)
#define GPTFAST_CPU_amx(X) X(tile_amx) X(gemm) X(causal_attention_fwd) X(causal_attention_bwd)
#define GPTFAST_ENGINE_amx(X) X(product_amx)
#elif defined(__aarch64__)
#define GPTFAST_ISAS(X, PART) X(scalar) X(neon) PART(neon_dotprod, neon) X(neon_bf16)
#define GPTFAST_CPU_neon_dotprod(X)
#define GPTFAST_ENGINE_neon_dotprod(X) X(product_bytes) X(product_mxfp4) X(product_small)
#else
#define GPTFAST_ISAS(X, PART) X(scalar)
#endif
// clang-format on

#if defined(__x86_64__)
// What cpuid says of the CPU, and xgetbv of the registers that the operating system saves. They are asked directly:
// __builtin_cpu_supports is part of the compiler's runtime, and with some compilers answers no to everything.
struct Cpu {
  unsigned ecx1 = 0, ebx7 = 0, ecx7 = 0, eax7_1 = 0, ecx_ext = 0;
  unsigned saved = 0;  // XCR0

  Cpu() {
    unsigned a = 0, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d)) ecx1 = c;
    a = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) ebx7 = b, ecx7 = c;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) eax7_1 = a;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d)) ecx_ext = c;
    constexpr unsigned osxsave = 1u << 27;
    if (ecx1 & osxsave) __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
  }
  bool avx2() const {  // what compilers call haswell
    constexpr unsigned fma = 1u << 12, movbe = 1u << 22, avx = 1u << 28, f16c = 1u << 29;
    constexpr unsigned bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8, lzcnt = 1u << 5, xmm_ymm = 0x6;
    return has(saved, xmm_ymm) && has(ecx1, fma | movbe | avx | f16c) && has(ebx7, bmi1 | avx2 | bmi2) &&
           has(ecx_ext, lzcnt);
  }
#ifdef GPTFAST_EMULATED_AVX512
  bool avx512() const { return avx2(); }
  bool avx512_bf16() const { return avx2(); }
#else
  bool avx512() const {
    constexpr unsigned f = 1u << 16, dq = 1u << 17, bw = 1u << 30, vl = 1u << 31, masks_and_zmm = 0xe0;
    return avx2() && has(saved, masks_and_zmm) && has(ebx7, f | dq | bw | vl);
  }
  bool avx512_bf16() const {
    constexpr unsigned vnni = 1u << 11, bf16 = 1u << 5;
    return avx512() && has(ecx7, vnni) && has(eax7_1, bf16);
  }
#endif

 private:
  static bool has(unsigned word, unsigned bits) { return (word & bits) == bits; }
};
#endif

#if defined(__aarch64__)
// What the operating system says of the CPU. Every AArch64 processor of a general system has NEON.
struct Cpu {
  bool dotprod = false, bf16 = false, i8mm = false;

  Cpu() {
#if defined(__linux__)
    constexpr unsigned long crc = 1ul << 7, atomics = 1ul << 8, rdm = 1ul << 12,
                            dp = 1ul << 20;                              // HWCAP; ARMv8.2 has three
    constexpr unsigned long has_i8mm = 1ul << 13, has_bf16 = 1ul << 14;  // HWCAP2
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2), needed = crc | atomics | rdm | dp;
    dotprod = (first & needed) == needed;
    bf16 = second & has_bf16;
    i8mm = second & has_i8mm;
#elif defined(__APPLE__)
    dotprod = has("hw.optional.arm.FEAT_DotProd");
    bf16 = has("hw.optional.arm.FEAT_BF16");
    i8mm = has("hw.optional.arm.FEAT_I8MM");
#endif
  }
  bool neon_bf16() const { return dotprod && bf16 && i8mm; }

#if defined(__APPLE__)
 private:
  static bool has(const char* feature) {  // an unknown name is an error: no
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
  }
#endif
};
#endif

// Whether kernels of this instruction set can run here.
inline bool can_run(const char* isa) {
  const auto is = [isa](const char* name) { return !std::strcmp(isa, name); };
  if (is("scalar")) return true;
#if defined(__x86_64__)
  const Cpu cpu;
  if (is("avx2")) return cpu.avx2();
  if (is("avx512")) return cpu.avx512();
  if (is("avx512_bf16")) return cpu.avx512_bf16();
#ifdef GPTFAST_EMULATED_TILES
  if (is("amx")) return cpu.avx512_bf16();
#else
  if (is("amx")) return cpu.avx512_bf16() && amx_permitted();
#endif
#elif defined(__aarch64__)
  const Cpu cpu;
  if (is("neon")) return true;
  if (is("neon_dotprod")) return cpu.dotprod;
  if (is("neon_bf16")) return cpu.neon_bf16();
#endif
  return false;
}

}  // namespace gptfast::cpu
