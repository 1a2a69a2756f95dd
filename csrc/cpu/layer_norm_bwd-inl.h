// LayerNorm, backward; see layer_norm-inl.h.
#include "norm_words-inl.h"

// xhat of a row is x scale + rest about center.
struct RowStatistics {
  F center, scale, rest;
  INL_MEMBER RowStatistics(const LayerNormParams& p, i64 r)
      : center(set(p.mean ? p.mean[r] : 0.f)), scale(set(p.rstd[r])),
        rest(set(p.mean ? -p.mean[p.R + r] * p.rstd[r] : 0.f)) {}
};

// Row r of what was normalised, and its gradients, of which either may be null. Where T is fp32 they were brought to it.
template <DType T> struct NormRow {
  const void *x, *dy, *dtotal;
  INL_MEMBER NormRow(const LayerNormParams& p, const NormBuffers& t, i64 r)
      : x(of(p, p.x, r, t.wide[0])), dy(of(p, p.dy, r, t.wide[1])), dtotal(of(p, p.dtotal, r, t.wide[2])) {}
  static INL_MEMBER const void* of(const LayerNormParams& p, const Rows& rows, i64 r, float* buffer) {
    if (!rows.data) return nullptr;
    return T == DType::f32 ? read_row(row(rows, r), rows.dtype, p.C, buffer) : row(rows, r);
  }
};

// Two sums over a row x and its dy: mean(g) and mean(g xhat); adds the row's share to dweight and dbias on the way.
template <DType T>
INL void norm_means(const LayerNormParams& p, const float* weight, const NormRow<T>& from, const RowStatistics& s,
                    float* dw, float* db, F* mean_g, F* mean_gx) {
  const void *x = from.x, *dy = from.dy;
  F g_sum[2] = {zero(), zero()}, gx_sum[2] = {zero(), zero()};
  for_lanes_paired(p.C, [&](i64 c, i64 n, int u) __attribute__((always_inline)) {
    const F xhat = fma(load_as<T>(x, c, n) - s.center, s.scale, s.rest), d = load_as<T>(dy, c, n);
    if (dw) store_lanes(dw + c, fma(d, xhat, load_lanes(dw + c, n)), n);
    if (db) store_lanes(db + c, load_lanes(db + c, n) + d, n);
    const F g = d * load_lanes(weight + c, n);  // 0 in lanes past the end
    g_sum[u] = g_sum[u] + g;
    gx_sum[u] = fma(g, n == L ? xhat : select_or_zero(first_n(n), xhat), gx_sum[u]);
  });
  *mean_g = p.mean ? set(sum(g_sum[0] + g_sum[1]) / float(p.C)) : zero();
  *mean_gx = set(sum(gx_sum[0] + gx_sum[1]) / float(p.C));
}

#ifdef GPTFAST_PAIRS
// The same two sums in the order of means_of_words, of a row whose dy has another dtype than x: so y has the gradients of its fp32
// result that is rounded afterwards, to the bit.
APART static void means_as_of_words(const LayerNormParams& p, const float* weight, const NormRow<DType::f32>& from,
                                    const RowStatistics& s, F* mean_g, F* mean_gx) {
  const float *x = static_cast<const float*>(from.x), *dy = static_cast<const float*>(from.dy);
  F g_sum[2] = {zero(), zero()}, gx_sum[2] = {zero(), zero()};
  for (i64 c = 0; c < p.C; c += 2 * L) {
    F g[2], xhat[2];
    UNROLL_FOR (int u = 0; u < 2; u++) {
      g[u] = load(dy + c + u * L) * load(weight + c + u * L);
      xhat[u] = fma(load(x + c + u * L) - s.center, s.scale, s.rest);
    }
    deinterleave(g[0], g[1]), deinterleave(xhat[0], xhat[1]);
    UNROLL_FOR (int u = 0; u < 2; u++) g_sum[u] = g_sum[u] + g[u], gx_sum[u] = fma(g[u], xhat[u], gx_sum[u]);
  }
  *mean_g = p.mean ? set(sum(g_sum[0] + g_sum[1]) / float(p.C)) : zero();
  *mean_gx = set(sum(gx_sum[0] + gx_sum[1]) / float(p.C));
}
#endif

// The gradient of row r of what was normalised, L values at a time, to store(c, gradient, n).
template <DType T, class Store>
INL void norm_gradient(const LayerNormParams& p, const float* weight, const NormRow<T>& from, const RowStatistics& s,
                       i64 r, F mean_g, F mean_gx, Store store) {
  const void *x = from.x, *dy = from.dy, *dtotal = from.dtotal;
  const char *next_x = next_row(p, p.x, r), *next_dy = next_row(p, p.dy, r);
  const i64 x_size = element_size(p.x.dtype), dy_size = element_size(p.dy.dtype);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    F d = zero();
    prefetch(next_x + c * x_size);
    if (next_dy) prefetch(next_dy + c * dy_size);
    if (dy) {
      const F xhat = fma(load_as<T>(x, c, n) - s.center, s.scale, s.rest);
      // rounded as in norm_means: a product fused with the difference would leave its rounding where both are equal
      const F g = fma(load_as<T>(dy, c, n), load_lanes(weight + c, n), zero());
      d = s.scale * fnma(xhat, mean_gx, g - mean_g);
    }
    store(c, dtotal ? d + load_as<T>(dtotal, c, n) : d, n);
  });
}

template <DType T>
APART static void norm_bwd_row(const LayerNormParams& p, const NormBuffers& t, i64 r, float* dw, float* db) {
  const MutRows &dx = p.dx, &dresidual = p.dresidual, &only = dx.data ? dx : dresidual;
  const uint32_t threshold = dx.data ? p.dropout.threshold : 0;
  const NormRow<T> from(p, t, r);
  const RowStatistics s(p, r);
  F mean_g = zero(), mean_gx = zero();
  if (from.dy) norm_means(p, t.weight, from, s, dw, db, &mean_g, &mean_gx);
#ifdef GPTFAST_PAIRS
  if constexpr (T == DType::f32)
    if (from.dy && in_words(p.x.dtype, p.C)) means_as_of_words(p, t.weight, from, s, &mean_g, &mean_gx);
#endif
  if (!threshold && !(dx.data && dresidual.data) && only.dtype == T) {
    void* out = row(only, r);
    const bool past = only.non_temporal;
    return norm_gradient(p, t.weight, from, s, r, mean_g, mean_gx,
                         [=](i64 c, F d, i64 n) __attribute__((always_inline)) { put_as<T>(past, out, c, d, n); });
  }
  if (threshold) dropout_lanes(t.lanes, p.dropout, 0, r, 0, p.C);
  void *to_x = dx.data ? row(dx, r) : nullptr, *to_residual = dresidual.data ? row(dresidual, r) : nullptr;
  const uint16_t* lanes = t.lanes;
  const float kept = dropout_scale(p.dropout);
  norm_gradient(p, t.weight, from, s, r, mean_g, mean_gx, [=](i64 c, F d, i64 n) __attribute__((always_inline)) {
    if (to_residual) put_any(dresidual.non_temporal, to_residual, dresidual.dtype, c, d, n);
    if (to_x) put_any(dx.non_temporal, to_x, dx.dtype, c, threshold ? drop(d, lanes + c, threshold, kept) : d, n);
  });
}

#ifdef GPTFAST_PAIRS
// ---- the same of rows of bf16 in words (norm_words-inl.h); dw and db lie as the weight does until their chunk is done ---------

INL Split normalised(const RowStatistics& s, Split x) {
  return {fma(x.even - s.center, s.scale, s.rest), fma(x.odd - s.center, s.scale, s.rest)};
}
// Of ROWS rows at once, which read and write dw and db together.
template <int ROWS>
APART static void means_of_words(const LayerNormParams& p, const float* weight, i64 r, float* dw, float* db, F* mean_g,
                                 F* mean_gx) {
  const void *x[ROWS], *dy[ROWS];
  F center[ROWS], scale[ROWS], rest[ROWS], g_sum[ROWS][2], gx_sum[ROWS][2];
  UNROLL_FOR (int u = 0; u < ROWS; u++) {
    const RowStatistics s(p, r + u);
    x[u] = row(p.x, r + u), dy[u] = row(p.dy, r + u), center[u] = s.center, scale[u] = s.scale, rest[u] = s.rest;
    g_sum[u][0] = g_sum[u][1] = gx_sum[u][0] = gx_sum[u][1] = zero();
  }
  for (i64 c = 0; c < p.C; c += 2 * L) {
    const Split w = {load(weight + c), load(weight + c + L)};
    Split to_w = {zero(), zero()}, to_b = to_w;
    if (dw) to_w = {load(dw + c), load(dw + c + L)};
    if (db) to_b = {load(db + c), load(db + c + L)};
    UNROLL_FOR (int u = 0; u < ROWS; u++) {
      const Split v = load_words(x[u], c), d = load_words(dy[u], c);
      const Split xhat = {fma(v.even - center[u], scale[u], rest[u]), fma(v.odd - center[u], scale[u], rest[u])};
      to_w = {fma(d.even, xhat.even, to_w.even), fma(d.odd, xhat.odd, to_w.odd)};
      to_b = {to_b.even + d.even, to_b.odd + d.odd};
      const F even = d.even * w.even, odd = d.odd * w.odd;
      g_sum[u][0] = g_sum[u][0] + even, g_sum[u][1] = g_sum[u][1] + odd;
      gx_sum[u][0] = fma(even, xhat.even, gx_sum[u][0]), gx_sum[u][1] = fma(odd, xhat.odd, gx_sum[u][1]);
    }
    if (dw) store(dw + c, to_w.even), store(dw + c + L, to_w.odd);
    if (db) store(db + c, to_b.even), store(db + c + L, to_b.odd);
  }
  UNROLL_FOR (int u = 0; u < ROWS; u++) {
    mean_g[u] = p.mean ? set(sum(g_sum[u][0] + g_sum[u][1]) / float(p.C)) : zero();
    mean_gx[u] = set(sum(gx_sum[u][0] + gx_sum[u][1]) / float(p.C));
  }
}
constexpr int kAhead = 2;
template <class Store>
INL void gradient_of_words(const LayerNormParams& p, const float* weight, i64 r, F mean_g, F mean_gx, Store store) {
  const void *dy = p.dy.data ? row(p.dy, r) : nullptr, *dtotal = p.dtotal.data ? row(p.dtotal, r) : nullptr;
  const RowStatistics s(p, r);
  const i64 ahead = r + kAhead < p.R ? kAhead - 1 : 0;  // rows are taken by twos
  const char *next_x = next_row(p, p.x, r + ahead), *next_dy = next_row(p, p.dy, r + ahead);
  for_words<1>(row(p.x, r), p.C, [=](i64 c, Split v, int) __attribute__((always_inline)) {
    Split d = {zero(), zero()};
    prefetch(next_x + 2 * c);
    if (next_dy) prefetch(next_dy + 2 * c);
    if (dy) {
      const Split xhat = normalised(s, v), up = load_words(dy, c);
      const F even = fma(up.even, load(weight + c), zero()), odd = fma(up.odd, load(weight + c + L), zero());
      d = {s.scale * fnma(xhat.even, mean_gx, even - mean_g), s.scale * fnma(xhat.odd, mean_gx, odd - mean_g)};
    }
    if (dtotal) {
      const Split more = load_words(dtotal, c);
      d = {d.even + more.even, d.odd + more.odd};
    }
    store(c, d);
  });
}
static void bwd_row_of_words(const LayerNormParams& p, const NormBuffers& t, i64 r, F mean_g, F mean_gx) {
  const MutRows &dx = p.dx, &dresidual = p.dresidual;
  const uint32_t threshold = dx.data ? p.dropout.threshold : 0;
  const MutRows& only = dx.data ? dx : dresidual;
  if (!threshold && !(dx.data && dresidual.data) && only.dtype == DType::bf16) {
    uint16_t* out = static_cast<uint16_t*>(row(only, r));
    const bool past = only.non_temporal;
    return gradient_of_words(p, t.weight, r, mean_g, mean_gx,
                             [=](i64 c, Split d) __attribute__((always_inline)) { put_words(past, out + c, d); });
  }
  void *to_x = dx.data ? row(dx, r) : nullptr, *to_residual = dresidual.data ? row(dresidual, r) : nullptr;
  uint16_t* lanes = t.lanes;
  const float kept = dropout_scale(p.dropout);
  gradient_of_words(p, t.weight, r, mean_g, mean_gx, [=, &p](i64 c, Split d) __attribute__((always_inline)) {
    if (to_residual) put_split(dresidual.non_temporal, to_residual, dresidual.dtype, c, d);
    if (!to_x) return;
    if (threshold && c % kDecided == 0)
      dropout_lanes(lanes, p.dropout, 0, r, c, p.C - c < kDecided ? p.C - c : kDecided);
    if (threshold) put_kept(dx.non_temporal, to_x, dx.dtype, c, d, lanes + c % kDecided, threshold, kept);
    else put_split(dx.non_temporal, to_x, dx.dtype, c, d);
  });
}
static void bwd_chunks_of_words(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
  const NormBuffers t(p);
  split_columns(t.weight, p.C);
  for (i64 k = chunk_begin; k < chunk_end; k++) {
    float *dw = p.dweight ? p.dweight + k * p.C : nullptr, *db = p.dbias ? p.dbias + k * p.C : nullptr;
    if (dw) __builtin_memset(dw, 0, size_t(p.C) * 4);
    if (db) __builtin_memset(db, 0, size_t(p.C) * 4);
    const i64 end = (k + 1) * kRowChunk < p.R ? (k + 1) * kRowChunk : p.R;
    for (i64 r = k * kRowChunk; r < end; r += kAhead) {
      F mean_g[kAhead] = {zero(), zero()}, mean_gx[kAhead] = {zero(), zero()};
      if (p.dy.data)
        r + 1 < end ? means_of_words<kAhead>(p, t.weight, r, dw, db, mean_g, mean_gx)
                    : means_of_words<1>(p, t.weight, r, dw, db, mean_g, mean_gx);
      for (i64 u = 0; u < kAhead && r + u < end; u++) bwd_row_of_words(p, t, r + u, mean_g[u], mean_gx[u]);
    }
    if (dw) join_columns(dw, p.C);
    if (db) join_columns(db, p.C);
  }
}
#endif

constexpr DType kOwnRows = kScalar || kOnlyBf16 ? DType::f32 : DType::bf16;
static void norm_bwd_chunks(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
  const bool own = p.x.dtype == DType::bf16 && (!p.dy.data || p.dy.dtype == DType::bf16);
  const NormBuffers t(p);
  for (i64 k = chunk_begin; k < chunk_end; k++) {
    float *dw = p.dweight ? p.dweight + k * p.C : nullptr, *db = p.dbias ? p.dbias + k * p.C : nullptr;
    if (dw) __builtin_memset(dw, 0, size_t(p.C) * 4);
    if (db) __builtin_memset(db, 0, size_t(p.C) * 4);
    const i64 end = (k + 1) * kRowChunk < p.R ? (k + 1) * kRowChunk : p.R;
    for (i64 r = k * kRowChunk; r < end; r++)
      own ? norm_bwd_row<kOwnRows>(p, t, r, dw, db) : norm_bwd_row<DType::f32>(p, t, r, dw, db);
  }
}
static void layer_norm_bwd(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
#ifdef GPTFAST_PAIRS
  if (in_words(p.x.dtype, p.C)) {
    const bool own = !p.dy.data || p.dy.dtype == p.x.dtype;
    own ? bwd_chunks_of_words(p, chunk_begin, chunk_end) : norm_bwd_chunks(p, chunk_begin, chunk_end);
    return stream_end();
  }
#endif
  if constexpr (kOnlyBf16) {  // the rest rounds gradients to bf16, of what was normalised in fp32
    const bool rounds =
        (p.dx.data && p.dx.dtype == DType::bf16) || (p.dresidual.data && p.dresidual.dtype == DType::bf16);
    if (p.x.dtype != DType::f32 || !rounds) return base.layer_norm_bwd(p, chunk_begin, chunk_end);
  }
  norm_bwd_chunks(p, chunk_begin, chunk_end);
  stream_end();
}

static void fill(Kernels& k) { k.layer_norm_bwd = layer_norm_bwd; }
