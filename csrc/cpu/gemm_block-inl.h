// A block of C = A B (+ bias) (+ C) from packed panels of B.
#pragma once
#include "gemm_panels-inl.h"
#include "products-inl.h"

// A word is an fp32 value or, with PAIR, two bf16 that are neighbours along k.
template <bool PAIR> constexpr i64 kWordStep = PAIR ? 2 * L : L;  // values in a vector of words
template <bool PAIR> COLD void gemm_last_words(uint32_t* out, const void* p, DType t, i64 n) {
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR)
    return istore(out, join_bf16(load_any(p, t, n < L ? n : L), n > L ? load_any(at(p, t, L), t, n - L) : zero()));
#endif
  istore(out, as_int(load_any(p, t, n)));
}
// Those of the row p from `element` on, of which n elements count; the rest is 0.
template <bool PAIR> INL I gemm_words(const void* p, DType t, i64 element, i64 n) {
  p = at(p, t, element);
  if (n < kWordStep<PAIR>) {
    alignas(64) uint32_t last[L];
    gemm_last_words<PAIR>(last, p, t, n);
    return iload(last);
  }
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR) return t == DType::bf16 ? iload(p) : join_bf16(load_any(p, t, L), load_any(at(p, t, L), t, L));
#endif
  return as_int(load_any(p, t, L));
}
// L words of neighbouring columns of a row (PAIR: of two rows, the second may be missing) of n columns.
template <bool PAIR> INL I gemm_word_row(const void* first, const void* second, DType t, i64 n, F* sum) {
  const F x = load_any(first, t, n);
#ifdef GPTFAST_PAIRS
  if constexpr (PAIR) {
    const F y = second ? load_any(second, t, n) : zero();
    *sum = *sum + (x + y);
    return pair_bf16(x, y);
  }
#endif
  *sum = *sum + x;
  return as_int(x);
}

// Words from row to row of a packed block of A, and of a transposed one. They spread over L1's sets, which rows in tiles need too.
constexpr i64 kGemmRow = kTiles ? kGemmDepth + 16 : kGemmDepth, kGemmPitch = kGemmRows + 16;
static_assert(kGemmRows * kGemmRow <= kGemmPitch * kGemmDepth);

// Brings a block of sums, its rows `pitch` apart, to C, or to the sums that are carried until the last stretch of k.
APART static void finish_block(const GemmParams& p, i64 m0, i64 rows, i64 c0, i64 c1, const float* c, i64 pitch,
                               bool last) {
  for (i64 r = 0; r < rows; r++) {
    const float* from = c + r * pitch;
    float* carry = p.carry ? p.carry + (m0 + r) * p.N + c0 : nullptr;
    void* to = at(row(p.c, m0 + r), p.c.dtype, c0);
    for_lanes(c1 - c0, [&](i64 j, i64 n) __attribute__((always_inline)) {
      F x = load(from + j);  // a row of the block is whole vectors
      if (p.k0) x = x + load_lanes(carry + j, n);
      if (!last) return store_lanes(carry + j, x, n);
      if (p.bias.data) x = x + load_any(at(p.bias.data, p.bias.dtype, c0 + j), p.bias.dtype, n);
      if (p.accumulate) x = x + load_any(at(to, p.c.dtype, j), p.c.dtype, n);
      store_any(at(to, p.c.dtype, j), p.c.dtype, x, n);
    });
  }
}

// One item: rows [m0, m0 + rows) and columns [c0, c1) of C.
template <bool PAIR> struct GemmBlock {
  static constexpr i64 per_word = PAIR ? 2 : 1;
  const GemmParams& p;
  const i64 m0, rows, c0, c1, pitch;
  const bool direct;  // rows of A are words as they lie
  float *c, *sums;
  uint32_t* packed_a;

  GemmBlock(const GemmParams& params, i64 m, i64 begin, i64 end)
      : p(params), m0(m), rows(p.M - m < kGemmRows ? p.M - m : kGemmRows), c0(begin), c1(end),
        pitch(round_up(end - begin, kPanel)),
        direct(!p.a.by_columns && p.a.dtype == (PAIR ? DType::bf16 : DType::f32) && p.K % per_word == 0 &&
               p.a.stride % per_word == 0) {
    c = static_cast<float*>(scratch(size_t(kGemmRows * pitch + kGemmPitch * kGemmDepth + kGemmPitch) * 4));
    packed_a = reinterpret_cast<uint32_t*>(c + kGemmRows * pitch);
    sums = reinterpret_cast<float*>(packed_a + kGemmPitch * kGemmDepth);
  }

  // Words [w0, w0 + words) of the block of A: where they lie and with which strides.
  struct Words {
    const uint32_t* data;
    i64 row, k;
  };
  APART Words words_of_a(i64 w0, i64 words) {
    const i64 k0 = w0 * per_word;
    const Matrix& a = p.a;
    if (direct) {
      const void* data = at(a.data, a.dtype, m0 * a.stride + k0);
      return {static_cast<const uint32_t*>(data), a.stride / per_word, 1};
    }
    if (!a.by_columns) {
      for (i64 r = 0; r < rows; r++)
        for (i64 w = 0; w < words; w += L)
          istore(packed_a + r * kGemmRow + w, gemm_words<PAIR>(at(a.data, a.dtype, (m0 + r) * a.stride), a.dtype,
                                                               k0 + w * per_word, p.K - k0 - w * per_word));
      return {packed_a, kGemmRow, 1};
    }
    if constexpr (kTiles) return turned_columns(k0, words);
    for (i64 r = 0; r < rows; r += L) {
      const i64 n = rows - r < L ? rows - r : L;
      F sum = zero();
      for (i64 w = 0; w < words; w++) {
        const i64 k = k0 + w * per_word;
        const void* row = at(a.data, a.dtype, k * a.stride + m0 + r);
        const void* next = PAIR && k + 1 < p.K ? at(row, a.dtype, a.stride) : nullptr;
        istore(packed_a + w * kGemmPitch + r, gemm_word_row<PAIR>(row, next, a.dtype, n, &sum));
      }
      store(sums + r, load(sums + r) + sum);
    }
    return {packed_a, 1, kGemmPitch};
  }
  // The same of A by columns, turned into rows.
  Words turned_columns(i64 k0, i64 words) {
    const Matrix& a = p.a;
    for (i64 r = 0; r < rows; r += L) {
      const i64 n = rows - r < L ? rows - r : L;
      F sum = load(sums + r);
      for (i64 w = 0; w < words; w += L) {
        I x[L];
        for (i64 i = 0; i < L; i++) {
          const i64 k = k0 + (w + i) * per_word;
          const void* row = at(a.data, a.dtype, k * a.stride + m0 + r);
          const void* next = PAIR && k + 1 < p.K ? at(row, a.dtype, a.stride) : nullptr;
          x[i] = w + i < words ? gemm_word_row<PAIR>(row, next, a.dtype, n, &sum) : iset(0);
        }
        transpose(x);
        for (i64 i = 0; i < n; i++) istore(packed_a + (r + i) * kGemmRow + w, x[i]);
      }
      store(sums + r, sum);
    }
    return {packed_a, kGemmRow, 1};
  }

  void multiply() {
    const i64 panels = (p.n1 - p.n0 + kPanel - 1) / kPanel;
    __builtin_memset(sums, 0, size_t(kGemmPitch) * 4);
    if (p.k0 >= p.k1) __builtin_memset(c, 0, size_t(kGemmRows * pitch) * 4);
    for (i64 block = 0; p.k0 + block * kGemmDepth < p.k1; block++) {
      const i64 w0 = p.k0 + block * kGemmDepth, words = p.k1 - w0 < kGemmDepth ? p.k1 - w0 : kGemmDepth;
      const Words a = words_of_a(w0, words);
      for (i64 column = c0; column < c1; column += kPanel) {
        const i64 panel = (column - p.n0) / kPanel;
        const uint32_t* b = p.packed + (block * panels + panel) * kGemmDepth * kPanel;
        float* to = c + column - c0;
        const i64 left = (c1 - column + L - 1) / L;  // vectors: a low rank fills no panel
        const int vectors = int(left < kPanel / L ? left : kPanel / L);
        const TileOp op = block == 0 ? TileOp::set : TileOp::add;
        constexpr int kVectors = int(kStrip / L);
        for (int v = 0; v < vectors; v += kVectors)
          product<PAIR>({op, a.data, a.row, a.k, b + packed_place(0, v * L), kStrip, words, to + v * L, pitch, rows,
                         vectors - v < kVectors ? vectors - v : kVectors, nullptr});
      }
    }
  }

  void finish() const {
    finish_block(p, m0, rows, c0, c1, c, pitch, p.k1 * per_word >= p.K);
    if (!p.a_sums || c0 > 0) return;
    for (i64 r = 0; r < rows; r++) p.a_sums[m0 + r] = sums[r] + (p.k0 ? p.a_sums[m0 + r] : 0.f);
  }
};

// Item t: block t % row_blocks of rows, columns [n0 + t / row_blocks * columns, …).
template <class Block> APART static void gemm_item(const GemmParams& p, i64 t) {
  const i64 row_blocks = (p.M + kGemmRows - 1) / kGemmRows;
  const i64 m0 = t % row_blocks * kGemmRows, c0 = p.n0 + t / row_blocks * p.columns;
  Block block(p, m0, c0, c0 + p.columns < p.n1 ? c0 + p.columns : p.n1);
  block.multiply();
  end_products();
  block.finish();
}
