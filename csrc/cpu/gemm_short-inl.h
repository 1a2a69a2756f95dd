// C = A B (+ C) for a C of bf16 and few k: a low-rank update, added where the base's product lies.
//
// C is read and written once, where gemm_block-inl.h gathers a block of it in fp32 first: tiles of 8 rows go over its columns
// from left to right, so that 8 stretches of memory stream. B is packed as there. An element has the bits that it has there.
//
// Floor: the read and the write of C; 2 M N K flops.
#pragma once
#include "gemm_block-inl.h"

#if defined(GPTFAST_PAIRS) && !defined(GPTFAST_MATRIX) && !defined(GPTFAST_TILES)  // whose sums have other bits
#define GPTFAST_SHORT
constexpr i64 kMostWords = kMostFew / 2;
static_assert(kStrip == kPanel);
constexpr i64 kAhead = 256;  // columns

// R rows of C, 2 L columns from `c` on, of which n are C's.
template <int R>
INL void short_tile(const uint32_t* a, const uint32_t* b, i64 words, bool add, uint16_t* c, i64 ldc, i64 n) {
  F acc[R][2];
  UNROLL_FOR (int r = 0; r < R; r++) acc[r][0] = acc[r][1] = zero();
  for (i64 k = 0; k < words; k++) {
    const I low = iload(b + k * kPanel), high = iload(b + k * kPanel + L);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I word = broadcast_word(a + r * kMostWords + k);
      acc[r][0] = multiply_words<true>(word, low, acc[r][0]);
      acc[r][1] = multiply_words<true>(word, high, acc[r][1]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++) {
    uint16_t* to = c + r * ldc;
    if (n >= 2 * L) {
      if (add) acc[r][0] = acc[r][0] + load_bf16(to), acc[r][1] = acc[r][1] + load_bf16(to + L);
      istore(to, join_bf16(acc[r][0], acc[r][1]));
      continue;
    }
    const i64 first = n < L ? n : L;
    store_any(to, DType::bf16, add ? acc[r][0] + load_any(to, DType::bf16, first) : acc[r][0], first);
    if (n > L)
      store_any(to + L, DType::bf16, add ? acc[r][1] + load_any(to + L, DType::bf16, n - L) : acc[r][1], n - L);
  }
}

// R rows from m0 on, columns [c0, c1).
template <int R> static void short_rows(const GemmParams& p, i64 m0, i64 c0, i64 c1) {
  const i64 words = (p.K + 1) / 2;
  alignas(64) uint32_t a[R * kMostWords];
  for (i64 r = 0; r < R; r++)
    for (i64 w = 0; w < words; w += L)
      istore(a + r * kMostWords + w,
             gemm_words<true>(at(p.a.data, p.a.dtype, (m0 + r) * p.a.stride), p.a.dtype, 2 * w, p.K - 2 * w));
  uint16_t* c = static_cast<uint16_t*>(p.c.data) + m0 * p.c.stride;
  for (i64 j = c0; j < c1; j += 2 * L) {
    if (j + kAhead < c1)
      for (i64 r = 0; r < R; r++) prefetch(c + r * p.c.stride + j + kAhead);
    const uint32_t* b = p.packed + (j - p.n0) / kPanel * kGemmDepth * kPanel + j % kPanel;
    short_tile<R>(a, b, words, p.accumulate, c + j, p.c.stride, c1 - j);
  }
}

// One item of gemm_block-inl.h.
struct ShortBlock {
  const GemmParams& p;
  const i64 m0, c0, c1;
  ShortBlock(const GemmParams& params, i64 m, i64 begin, i64 end) : p(params), m0(m), c0(begin), c1(end) {}

  void multiply() const {
    const i64 end = m0 + kGemmRows < p.M ? m0 + kGemmRows : p.M;
    i64 m = m0;
    for (; m + 8 <= end; m += 8) short_rows<8>(p, m, c0, c1);
    for (; m < end; m++) short_rows<1>(p, m, c0, c1);
  }
  void finish() const {}
};

INL bool is_short(const GemmParams& p) {
  return p.pairs && p.K > 0 && p.K <= kMostFew && p.c.dtype == DType::bf16 && !p.a.by_columns && !p.bias.data &&
         !p.a_sums;
}
#endif
