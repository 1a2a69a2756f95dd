// Words of 32 bits as the micro-kernels multiply them: one fp32, or, with PAIR, two bf16 that are neighbours along k
// (vdpbf16ps and bfdot add both products in fp32).
#pragma once

INL I broadcast_word(const uint32_t* p) {
  uint32_t w;
  __builtin_memcpy(&w, p, 4);  // bf16 pairs of a misaligned tensor are read here
  return iset(w);
}
template <bool PAIR> INL F multiply_words(I a, I b, F acc) {
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR) return multiply_pairs(acc, a, b);
#endif
  return fma(as_float(a), as_float(b), acc);
}
