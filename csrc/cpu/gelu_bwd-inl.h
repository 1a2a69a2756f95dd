// GELU, backward; see gelu-inl.h.
#include "gelu-inl.h"

template <DType T, bool TANH> APART static void gelu_bwd_chunk(const GeluParams& p, i64 chunk) {
  alignas(64) float buffer[kGeluBlock];
  const i64 r0 = chunk * kRowChunk, r1 = r0 + kRowChunk < p.R ? r0 + kRowChunk : p.R;
  const bool past = p.out.non_temporal;
  for (i64 c0 = 0; c0 < p.C; c0 += kGeluBlock) {
    const i64 width = p.C - c0 < kGeluBlock ? p.C - c0 : kGeluBlock;
    const float* bias = gelu_bias<T>(p, c0, width, buffer);
    float* db = p.dbias ? p.dbias + chunk * p.C + c0 : nullptr;
    if (db) __builtin_memset(db, 0, size_t(width) * 4);
    rows_by_twos<T, kGeluTwos<TANH>>(p, r0, r1, c0, width, [&](i64 r, auto rows, i64 n) __attribute__((always_inline)) {
      const void* dy[] = {row(p.dout, r), row(p.dout, r + rows.value - 1)};
      void* dx[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
      i64 done = 0;
#ifdef GPTFAST_PAIRS
      Split sums = {zero(), zero()};
      done = gelu_words<T, rows.value>(p, r, bias, c0, n, [&](int u, i64 c, Split z) __attribute__((always_inline)) {
        const Split d = load_words(dy[u], c0 + c);
        const Split dz = {d.even * gelu_slope<T, TANH>(z.even), d.odd * gelu_slope<T, TANH>(z.odd)};
        put_words(past, at(dx[u], T, c0 + c), dz);
        if (!db) return;
        sums = u ? Split{sums.even + dz.even, sums.odd + dz.odd} : dz;
        if (u == rows.value - 1)
          store(db + c, load(db + c) + sums.even), store(db + c + L, load(db + c + L) + sums.odd);
      });
#endif
      F sum = zero();
      gelu_columns<T, rows.value>(p, r, bias, c0, done, n,
                                  [&](int u, i64 c, F z, i64 k) __attribute__((always_inline)) {
                                    const F d = load_as<T>(dy[u], c0 + c, k) * gelu_slope<T, TANH>(z);
                                    put_as<T>(past, dx[u], c0 + c, d, k);
                                    if (!db) return;
                                    sum = u ? sum + d : d;
                                    if (u == rows.value - 1) store_lanes(db + c, load_lanes(db + c, k) + sum, k);
                                  });
    });
#ifdef GPTFAST_PAIRS
    if (T == DType::bf16 && db) join_columns(db, width / (2 * L) * (2 * L));
#endif
  }
}
static void gelu_bwd(const GeluParams& p, i64 chunk_begin, i64 chunk_end) {
  if (is_left_to_base(p.x.dtype)) return base.gelu_bwd(p, chunk_begin, chunk_end);
  with_own_dtype(p.x.dtype, [&](auto t) {
    for (i64 k = chunk_begin; k < chunk_end; k++)
      p.tanh ? gelu_bwd_chunk<t.value, true>(p, k) : gelu_bwd_chunk<t.value, false>(p, k);
  });
  stream_end();
}

static void fill(Kernels& k) { k.gelu_bwd = gelu_bwd; }
