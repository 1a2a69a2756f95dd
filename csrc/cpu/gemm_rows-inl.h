// C = A B (+ bias) (+ C) for few rows of A and a B stored by columns, which is read once where it lies: lanes run along k.
//
// Several columns at once hide the latency of a sum, and the lines of the next ones are asked for on the way: a column is too
// short a stretch for the processor to see them coming. An element is a sum of L sums, whatever M, N and the threads are: its
// bits depend on K alone.
//
// Floor: the read of B.
#pragma once
#include "gemm_block-inl.h"

// R rows of A, words that lie `pitch` apart, by O columns of B.
template <bool PAIR, DType T, int R, int O>
static void dot_columns(const uint32_t* a, i64 pitch, const void* b, i64 stride, i64 K, float* c, i64 ldc) {
  constexpr i64 step = kWordStep<PAIR>;
  F acc[R][O];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int o = 0; o < O; o++) acc[r][o] = zero();
  for (i64 k = 0; k < K; k += step, a += L) {
    I column[O];
    UNROLL_FOR (int o = 0; o < O; o++) {
      prefetch(at(b, T, (O + o) * stride + k));
      column[o] = gemm_words<PAIR>(at(b, T, o * stride), T, k, K - k);
    }
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I row_of_a = iload(a + r * pitch);
      UNROLL_FOR (int o = 0; o < O; o++) acc[r][o] = multiply_words<PAIR>(row_of_a, column[o], acc[r][o]);
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int o = 0; o < O; o++) c[r * ldc + o] = sum(acc[r][o]);
}

// One item: all rows, columns [c0, c1) of C.
template <bool PAIR> struct RowsBlock {
  static constexpr i64 step = kWordStep<PAIR>;
  const GemmParams& p;
  const i64 c0, c1, pitch;
  float* c;
  const uint32_t* words;  // of A, `apart` from row to row; past the end of a row they are 0
  i64 apart;

  RowsBlock(const GemmParams& params, i64, i64 begin, i64 end)
      : p(params), c0(begin), c1(end), pitch(round_up(end - begin, kPanel)) {
    const DType own = PAIR ? DType::bf16 : DType::f32;
    const i64 row_words = round_up(p.K, step) / step * L;
    c = static_cast<float*>(scratch(size_t(p.M * (pitch + row_words)) * 4));
    if (p.a.dtype == own && p.K % step == 0 && p.a.stride % (step / L) == 0) {
      words = static_cast<const uint32_t*>(p.a.data), apart = p.a.stride / (step / L);
      return;
    }
    uint32_t* to = reinterpret_cast<uint32_t*>(c + p.M * pitch);
    words = to, apart = row_words;
    for (i64 m = 0; m < p.M; m++)
      for (i64 k = 0; k < p.K; k += step, to += L)
        istore(to, gemm_words<PAIR>(at(p.a.data, p.a.dtype, m * p.a.stride), p.a.dtype, k, p.K - k));
  }

  // R rows from m on; as many columns at once as hide the latency of a sum.
  template <DType T, int R> void rows(i64 m) const {
    constexpr int O = kScalar ? 1 : R == 8 || (L == 8 && R == 4) ? 2 : 4;
    const i64 stride = p.b.stride;
    i64 n = c0;
    for (; n + O <= c1; n += O)
      dot_columns<PAIR, T, R, O>(words + m * apart, apart, at(p.b.data, T, n * stride), stride, p.K,
                                 c + m * pitch + n - c0, pitch);
    for (; O > 1 && n < c1; n++)
      dot_columns<PAIR, T, R, 1>(words + m * apart, apart, at(p.b.data, T, n * stride), stride, p.K,
                                 c + m * pitch + n - c0, pitch);
  }
  void multiply() const {
    with_dtype(p.b.dtype, [&](auto t) {
      i64 m = 0;
      // fp16, and fp32 that is rounded to pairs, are rarer: fewer kinds of tiles
      constexpr bool few = t.value == DType::f16 || (PAIR && t.value == DType::f32);
      if constexpr (!kScalar) {
        if constexpr (L != 8 && !few)
          for (; m + 8 <= p.M; m += 8) rows<t.value, 8>(m);
        for (; m + 4 <= p.M; m += 4) rows<t.value, 4>(m);
        if constexpr (!few)
          for (; m + 2 <= p.M; m += 2) rows<t.value, 2>(m);
      }
      for (; m < p.M; m++) rows<t.value, 1>(m);
    });
  }
  void finish() const { finish_block(p, 0, p.M, c0, c1, c, pitch, true); }
};
