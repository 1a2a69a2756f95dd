// GELU, forward; see gelu-inl.h.
#include "gelu-inl.h"

template <DType T, bool TANH> APART static void gelu_fwd_rows(const GeluParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float buffer[kGeluBlock];
  const bool past = p.out.non_temporal;
  for (i64 c0 = 0; c0 < p.C; c0 += kGeluBlock) {
    const i64 width = p.C - c0 < kGeluBlock ? p.C - c0 : kGeluBlock;
    const float* bias = gelu_bias<T>(p, c0, width, buffer);
    rows_by_twos<T, kGeluTwos<TANH>>(
        p, row_begin, row_end, c0, width, [&](i64 r, auto rows, i64 n) __attribute__((always_inline)) {
          void* y[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
          i64 done = 0;
#ifdef GPTFAST_PAIRS
          done =
              gelu_words<T, rows.value>(p, r, bias, c0, n, [&](int u, i64 c, Split z) __attribute__((always_inline)) {
                put_words(past, at(y[u], T, c0 + c), {gelu_value<T, TANH>(z.even), gelu_value<T, TANH>(z.odd)});
              });
#endif
          gelu_columns<T, rows.value>(p, r, bias, c0, done, n,
                                      [&](int u, i64 c, F z, i64 k) __attribute__((always_inline)) {
                                        put_as<T>(past, y[u], c0 + c, gelu_value<T, TANH>(z), k);
                                      });
        });
  }
}
static void gelu_fwd(const GeluParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.x.dtype)) return base.gelu_fwd(p, row_begin, row_end);
  with_own_dtype(p.x.dtype, [&](auto t) {
    p.tanh ? gelu_fwd_rows<t.value, true>(p, row_begin, row_end) : gelu_fwd_rows<t.value, false>(p, row_begin, row_end);
  });
  stream_end();
}

static void fill(Kernels& k) { k.gelu_fwd = gelu_fwd; }
