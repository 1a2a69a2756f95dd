// Instructions on the bits of words: as in mma.cuh each has a device body and an emulated body.
#pragma once
#include "compat.cuh"

namespace gptfast::cuda {

#if !defined(CUDA_EMU)
// ---- device ---------------------------------------------------------------------------------------------------------
// Bytes of a (0 to 3) and b (4 to 7) that the nibbles of `which` name, lowest first.
DEV_INLINE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }
// x & mask | bits in one instruction, where the compiler makes two of constants.
DEV_INLINE uint32_t masked_with(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
  return y;
}
#else
// ---- emulated -------------------------------------------------------------------------------------------------------
inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t picked = 0;
  for (int i = 0; i < 4; i++) picked |= uint32_t(both >> (which >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return picked;
}
inline uint32_t masked_with(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
#endif

}  // namespace gptfast::cuda
