// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum, forward and backward.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes (moments)
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy   (per chunk of rows, added in chunk order)
//
// Floor: one read and one write forward (with a residual two and two), two reads and one write backward (three and one
// or two); a row of up to some thousand values stays in L1 over its passes.

// What this thread keeps beside the rows: weight and bias as fp32, and the dropout decisions of a row.
struct NormBuffers {
  float *weight, *bias, *wide;  // wide: a row of 16 bits as fp32
  uint16_t* lanes;
  void* total;  // the row that is normalised, where p.total goes past the caches
  explicit NormBuffers(const LayerNormParams& p) {
    const i64 n = round_up(p.C + L, 16);
    weight = static_cast<float*>(scratch(size_t(4 * n) * 4 + size_t(round_up(p.C, 8 * L)) * 2));
    bias = weight + n;
    total = bias + n;
    wide = bias + 2 * n;
    lanes = reinterpret_cast<uint16_t*>(bias + 3 * n);
    copy_row(weight, p.weight.data, p.weight.dtype, p.C);
    if (p.bias.data) copy_row(bias, p.bias.data, p.bias.dtype, p.C);
    else __builtin_memset(bias, 0, size_t(p.C) * 4);
  }
};

// Row r + 1, to be asked for while row r is computed: rows from memory cost a fifth less so. nullptr stays nullptr.
INL const char* next_row(const LayerNormParams& p, const Rows& x, i64 r) {
  return static_cast<const char*>(x.data ? row(x, r + 1 < p.R ? r + 1 : r) : nullptr);
}

// total = dropout(x) + residual, and the same into `copy` if there is one; load_x(c, n) and load_residual(c, n) give the
// values.
template <DType T, class X, class R>
INL void add_rows(const LayerNormParams& p, const uint16_t* lanes, void* total, void* copy, X load_x, R load_residual) {
  const uint32_t threshold = p.dropout.threshold;
  const float kept = dropout_scale(p.dropout);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    const F x = load_x(c, n);
    const F sum = (threshold ? drop(x, lanes + c, threshold, kept) : x) + load_residual(c, n);
    put_as<T>(copy, total, c, sum, n);
    if (copy) store_as<T>(copy, c, sum, n);
  });
}

// Row r of what is normalised: x, or the total, rounded as it is stored, which is what the next layer sees too.
template <DType T> static const void* norm_input(const LayerNormParams& p, const NormBuffers& t, i64 r) {
  const void* x = row(p.x, r);
  if (!p.residual.data) return x;
  const void* residual = row(p.residual, r);
  void *total = row(p.total, r), *copy = p.total.stream ? t.total : nullptr;
  if (p.dropout.threshold) dropout_lanes(t.lanes, p.dropout, 0, r, 0, p.C);
  const DType x_type = p.x.dtype, residual_type = p.residual.dtype;
  if (x_type == T && residual_type == T)
    add_rows<T>(
        p, t.lanes, total, copy, [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(x, c, n); },
        [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(residual, c, n); });
  else
    add_rows<T>(
        p, t.lanes, total, copy,
        [=](i64 c, i64 n) __attribute__((always_inline)) { return load_any(at(x, x_type, c), x_type, n); },
        [=](i64 c, i64 n)
            __attribute__((always_inline)) { return load_any(at(residual, residual_type, c), residual_type, n); });
  return copy ? copy : total;
}

struct Moments {
  float mean, rest, variance;  // the mean is mean + rest
};
// In two passes over the row, which it leaves in `wide` where T is not fp32. The first sum's roundings may exceed the spread
// of a row far from 0, so the second pass sums the differences from that mean too and corrects it. Where the mean is
// thousands of spreads away its own rounding counts: `rest` keeps it.
template <DType T> INL Moments moments(const void* x, float* wide, i64 C) {
  const float sum = row_sum(C, [&](i64 c, i64 n) __attribute__((always_inline)) {
    const F value = load_as<T>(x, c, n);
    if constexpr (T != DType::f32) store(wide + c, value);
    return value;
  });
  const float near = sum / float(C);
  const float* values = T == DType::f32 ? static_cast<const float*>(x) : wide;
  const F center = set(near);
  const TwoSums rest = row_sums(C, [&](i64 c, i64 n, F& sum, F& squares) __attribute__((always_inline)) {
    const F d = load_lanes(values + c, n) - center;
    const F counted = n == L ? d : keep(first_n(n), d);
    sum = sum + counted;
    squares = fma(counted, counted, squares);
  });
  const float left = rest.first / float(C), variance = rest.second / float(C) - left * left, mean = near + left;
  return {mean, left - (mean - near), variance < 0.f ? 0.f : variance};
}

template <DType T> static void norm_fwd_rows(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p);
  for (i64 r = row_begin; r < row_end; r++) {
    const void* x = norm_input<T>(p, t, r);
    const Moments m = moments<T>(x, t.wide, p.C);
    const float rstd = 1.f / __builtin_sqrtf(m.variance + p.eps);
    p.mean[r] = m.mean;
    p.mean[p.R + r] = m.rest;
    p.rstd[r] = rstd;
    const F center = set(m.mean), scale = set(rstd), rest = set(-m.rest * rstd);
    void* y = row(p.y, r);
    const float *weight = t.weight, *bias = t.bias;
    const float* values = T == DType::f32 ? static_cast<const float*>(x) : t.wide;
    const bool past = p.y.stream;
    const char *next_x = next_row(p, p.x, r), *next_residual = next_row(p, p.residual, r);
    for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
      prefetch(next_x + c * element_size(T));
      if (next_residual) prefetch(next_residual + c * element_size(T));
      const F xhat = fma(load_lanes(values + c, n) - center, scale, rest);
      put_as<T>(past, y, c, fma(xhat, load_lanes(weight + c, n), load_lanes(bias + c, n)), n);
    });
  }
}
static void layer_norm_fwd(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  with_dtype(p.y.dtype, [&](auto t) { norm_fwd_rows<t.value>(p, row_begin, row_end); });
  stream_end();
}

// Two sums over a row of x and dy: mean(g) and mean(g xhat); adds the row's share to dweight and dbias on the way.
template <DType T>
INL void norm_means(const LayerNormParams& p, const float* weight, i64 r, float* dw, float* db, F* mean_g, F* mean_gx) {
  const void *x = row(p.x, r), *dy = row(p.dy, r);
  const F center = set(p.mean[r]), scale = set(p.rstd[r]), rest = set(-p.mean[p.R + r] * p.rstd[r]);
  F g_sum[2] = {zero(), zero()}, gx_sum[2] = {zero(), zero()};
  for_lanes_paired(p.C, [&](i64 c, i64 n, int u) __attribute__((always_inline)) {
    const F xhat = fma(load_as<T>(x, c, n) - center, scale, rest), d = load_as<T>(dy, c, n);
    store_lanes(dw + c, fma(d, xhat, load_lanes(dw + c, n)), n);
    if (db) store_lanes(db + c, load_lanes(db + c, n) + d, n);
    const F g = d * load_lanes(weight + c, n);  // 0 in lanes past the end
    g_sum[u] = g_sum[u] + g;
    gx_sum[u] = fma(g, n == L ? xhat : keep(first_n(n), xhat), gx_sum[u]);
  });
  *mean_g = set(sum(g_sum[0] + g_sum[1]) / float(p.C));
  *mean_gx = set(sum(gx_sum[0] + gx_sum[1]) / float(p.C));
}

// The gradient of row r of what was normalised, L values at a time, to store(c, gradient, n).
template <DType T, class Store>
INL void norm_gradient(const LayerNormParams& p, const float* weight, i64 r, F mean_g, F mean_gx, Store store) {
  const void* x = row(p.x, r);
  const void *dy = p.dy.data ? row(p.dy, r) : nullptr, *dtotal = p.dtotal.data ? row(p.dtotal, r) : nullptr;
  const F center = set(p.mean[r]), scale = set(p.rstd[r]), rest = set(-p.mean[p.R + r] * p.rstd[r]);
  const char *next_x = next_row(p, p.x, r), *next_dy = next_row(p, p.dy, r);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    F d = zero();
    prefetch(next_x + c * element_size(T));
    if (next_dy) prefetch(next_dy + c * element_size(T));
    if (dy) {
      const F xhat = fma(load_as<T>(x, c, n) - center, scale, rest);
      // rounded as in norm_means: a product fused with the difference would leave its rounding where both are equal
      const F g = fma(load_as<T>(dy, c, n), load_lanes(weight + c, n), zero());
      d = scale * fnma(xhat, mean_gx, g - mean_g);
    }
    store(c, dtotal ? d + load_as<T>(dtotal, c, n) : d, n);
  });
}

template <DType T>
static void norm_bwd_row(const LayerNormParams& p, const NormBuffers& t, i64 r, float* dw, float* db) {
  const MutRows &dx = p.dx, &dresidual = p.dresidual;
  const uint32_t threshold = dx.data ? p.dropout.threshold : 0;
  F mean_g = zero(), mean_gx = zero();
  if (p.dy.data) norm_means<T>(p, t.weight, r, dw, db, &mean_g, &mean_gx);
  const MutRows& only = dx.data ? dx : dresidual;
  if (!threshold && !(dx.data && dresidual.data) && only.dtype == T) {
    void* out = row(only, r);
    const bool past = only.stream;
    norm_gradient<T>(p, t.weight, r, mean_g, mean_gx,
                     [=](i64 c, F d, i64 n) __attribute__((always_inline)) { put_as<T>(past, out, c, d, n); });
    return;
  }
  if (threshold) dropout_lanes(t.lanes, p.dropout, 0, r, 0, p.C);
  void *to_x = dx.data ? row(dx, r) : nullptr, *to_residual = dresidual.data ? row(dresidual, r) : nullptr;
  const uint16_t* lanes = t.lanes;
  const float kept = dropout_scale(p.dropout);
  norm_gradient<T>(p, t.weight, r, mean_g, mean_gx, [=](i64 c, F d, i64 n) __attribute__((always_inline)) {
    if (to_residual) store_any(at(to_residual, dresidual.dtype, c), dresidual.dtype, d, n);
    if (to_x) store_any(at(to_x, dx.dtype, c), dx.dtype, threshold ? drop(d, lanes + c, threshold, kept) : d, n);
  });
}

template <DType T> static void norm_bwd_chunks(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
  const NormBuffers t(p);
  for (i64 k = chunk_begin; k < chunk_end; k++) {
    float *dw = p.dweight + k * p.C, *db = p.dbias ? p.dbias + k * p.C : nullptr;
    __builtin_memset(dw, 0, size_t(p.C) * 4);
    if (db) __builtin_memset(db, 0, size_t(p.C) * 4);
    const i64 end = (k + 1) * kRowChunk < p.R ? (k + 1) * kRowChunk : p.R;
    for (i64 r = k * kRowChunk; r < end; r++) norm_bwd_row<T>(p, t, r, dw, db);
  }
}
static void layer_norm_bwd(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
  with_dtype(p.x.dtype, [&](auto t) { norm_bwd_chunks<t.value>(p, chunk_begin, chunk_end); });
  stream_end();
}
