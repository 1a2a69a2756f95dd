// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum, forward and backward.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy   (per chunk of rows, added in chunk order)
//
// Floor: one read and one write forward (with a residual two and two), two reads and one write backward (three and one
// or two); a row of up to some thousand values stays in L1 over its passes.

// What this thread keeps beside the rows: weight and bias as fp32, and the dropout decisions of a row.
struct NormBuffers {
  float *weight, *bias;
  uint16_t* lanes;
  void* total;  // the row that is normalised, where p.total goes past the caches
  explicit NormBuffers(const LayerNormParams& p) {
    const i64 n = round_up(p.C + L, 16);
    weight = static_cast<float*>(scratch(size_t(3 * n) * 4 + size_t(round_up(p.C, 8 * L)) * 2));
    bias = weight + n;
    total = bias + n;
    lanes = reinterpret_cast<uint16_t*>(bias + 2 * n);
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
    add_rows<T>(p, t.lanes, total, copy, [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(x, c, n); },
                [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(residual, c, n); });
  else
    add_rows<T>(
        p, t.lanes, total, copy,
        [=](i64 c, i64 n) __attribute__((always_inline)) { return load_any(at(x, x_type, c), x_type, n); },
        [=](i64 c, i64 n)
            __attribute__((always_inline)) { return load_any(at(residual, residual_type, c), residual_type, n); });
  return copy ? copy : total;
}

template <DType T> static void norm_fwd_rows(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p);
  for (i64 r = row_begin; r < row_end; r++) {
    const void* x = norm_input<T>(p, t, r);
    const float total = row_sum(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(x, c, n); });
    const F center = set(total / float(p.C));
    const float square = row_sum(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      const F d = load_as<T>(x, c, n) - center;
      const F counted = n == L ? d : keep(first_n(n), d);
      return counted * counted;
    });
    const float rstd = 1.f / __builtin_sqrtf(square / float(p.C) + p.eps);
    p.mean[r] = total / float(p.C);
    p.rstd[r] = rstd;
    const F scale = set(rstd);
    void* y = row(p.y, r);
    const float *weight = t.weight, *bias = t.bias;
    const bool past = p.y.stream;
    const char *next_x = next_row(p, p.x, r), *next_residual = next_row(p, p.residual, r);
    for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
      prefetch(next_x + c * element_size(T));
      if (next_residual) prefetch(next_residual + c * element_size(T));
      const F xhat = (load_as<T>(x, c, n) - center) * scale;
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
  const F center = set(p.mean[r]), scale = set(p.rstd[r]);
  F g_sum[2] = {zero(), zero()}, gx_sum[2] = {zero(), zero()};
  for_lanes_paired(p.C, [&](i64 c, i64 n, int u) __attribute__((always_inline)) {
    const F xhat = (load_as<T>(x, c, n) - center) * scale, d = load_as<T>(dy, c, n);
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
  const F center = set(p.mean[r]), scale = set(p.rstd[r]);
  const char *next_x = next_row(p, p.x, r), *next_dy = next_row(p, p.dy, r);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    F d = zero();
    prefetch(next_x + c * element_size(T));
    if (next_dy) prefetch(next_dy + c * element_size(T));
    if (dy) {
      const F xhat = (load_as<T>(x, c, n) - center) * scale;
      const F g = load_as<T>(dy, c, n) * load_lanes(weight + c, n);
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
    norm_gradient<T>(p, t.weight, r, mean_g, mean_gx, [=](i64 c, F d, i64 n) __attribute__((always_inline)) {
      put_as<T>(past, out, c, d, n);
    });
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
