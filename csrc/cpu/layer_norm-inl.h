// LayerNorm (Ba et al., arXiv 1607.06450) over rows, alone or after dropout and a residual sum, forward and backward.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy   (per chunk of rows, added in chunk order)
//
// Floor: one read and one write forward (with a residual two and two), two reads and one write backward (three and one
// or two); a row of up to some thousand values stays in L1 over its passes.

// Row buffers of this thread, fp32, each with room for C values and a vector of overhang.
struct NormBuffers {
  float *weight, *bias, *x, *residual, *y, *g;
  uint16_t* lanes;
  explicit NormBuffers(i64 C) {
    const i64 n = round_up(C + L, 16);
    float* p = static_cast<float*>(scratch(size_t(6 * n) * 4 + size_t(round_up(C, 8 * L)) * 2));
    weight = p, bias = p + n, x = p + 2 * n, residual = p + 3 * n, y = p + 4 * n, g = p + 5 * n;
    lanes = reinterpret_cast<uint16_t*>(p + 6 * n);
  }
};

// sum over the row of f(c, n), which gives 0 in lanes that do not count; four sums run side by side
template <class Fn> INL float row_sum(i64 C, Fn f) {
  F s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  i64 c = 0;
  for (; c + 4 * L <= C; c += 4 * L) {
    s0 = s0 + f(c, i64(L));
    s1 = s1 + f(c + L, i64(L));
    s2 = s2 + f(c + 2 * L, i64(L));
    s3 = s3 + f(c + 3 * L, i64(L));
  }
  for (; c + L <= C; c += L) s0 = s0 + f(c, i64(L));
  if (c < C) s1 = s1 + f(c, C - c);
  return sum((s0 + s1) + (s2 + s3));
}

// total of row r as fp32, rounded as it is stored: what both LayerNorm and the next layer see.
static const float* norm_input(const LayerNormParams& p, const NormBuffers& t, i64 r) {
  const float* x = read_row(row(p.x, r), p.x.dtype, p.C, t.x);
  if (!p.residual.data) return x;
  const float* residual = read_row(row(p.residual, r), p.residual.dtype, p.C, t.residual);
  float* total = write_row(row(p.total, r), p.total.dtype, t.x);
  const DropoutParams& d = p.dropout;
  if (d.threshold) {
    dropout_lanes(t.lanes, d, 0, r, 0, p.C);
    const float scale = dropout_scale(d);
    for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      const F kept = drop(load_lanes(x + c, n), t.lanes + c, d.threshold, scale);
      store_lanes(total + c, kept + load_lanes(residual + c, n), n);
    });
  } else {
    for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      store_lanes(total + c, load_lanes(x + c, n) + load_lanes(residual + c, n), n);
    });
  }
  finish_row(row(p.total, r), p.total.dtype, total, p.C);
  return p.total.dtype == DType::f32 ? total : read_row(row(p.total, r), p.total.dtype, p.C, t.x);
}

static void layer_norm_fwd(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p.C);
  const float* weight = read_row(p.weight.data, p.weight.dtype, p.C, t.weight);
  const float* bias = p.bias.data ? read_row(p.bias.data, p.bias.dtype, p.C, t.bias) : nullptr;
  for (i64 r = row_begin; r < row_end; r++) {
    const float* x = norm_input(p, t, r);
    const float mean = row_sum(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) { return load_lanes(x + c, n); }) /
                       float(p.C);
    const F center = set(mean);
    const float square = row_sum(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      const F d = load_lanes(x + c, n) - center;
      const F counted = n == L ? d : keep(first_n(n), d);
      return counted * counted;
    });
    const float rstd = 1.f / __builtin_sqrtf(square / float(p.C) + p.eps);
    p.mean[r] = mean;
    p.rstd[r] = rstd;
    const F scale = set(rstd);
    float* y = write_row(row(p.y, r), p.y.dtype, t.y);
    for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      const F xhat = (load_lanes(x + c, n) - center) * scale, w = load_lanes(weight + c, n);
      store_lanes(y + c, bias ? fma(xhat, w, load_lanes(bias + c, n)) : xhat * w, n);
    });
    finish_row(row(p.y, r), p.y.dtype, y, p.C);
  }
}

// dy -> gradient of total in t.g, adding this row's share of dweight and dbias.
static void norm_slope(const LayerNormParams& p, const NormBuffers& t, i64 r, const float* weight, float* dw, float* db) {
  const float* x = read_row(row(p.x, r), p.x.dtype, p.C, t.x);
  const float* dy = read_row(row(p.dy, r), p.dy.dtype, p.C, t.y);
  const F center = set(p.mean[r]), scale = set(p.rstd[r]);
  F a0 = zero(), b0 = zero();
  for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
    const F xhat = (load_lanes(x + c, n) - center) * scale, d = load_lanes(dy + c, n);
    store_lanes(dw + c, fma(d, xhat, load_lanes(dw + c, n)), n);
    if (db) store_lanes(db + c, load_lanes(db + c, n) + d, n);
    const F g = d * load_lanes(weight + c, n);  // 0 in lanes past the end
    a0 = a0 + g;
    b0 = fma(g, n == L ? xhat : keep(first_n(n), xhat), b0);
  });
  const F mean_g = set(sum(a0) / float(p.C)), mean_gx = set(sum(b0) / float(p.C));
  for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
    const F xhat = (load_lanes(x + c, n) - center) * scale;
    const F g = load_lanes(dy + c, n) * load_lanes(weight + c, n);
    store_lanes(t.g + c, scale * fnma(xhat, mean_gx, g - mean_g), n);
  });
}

static void layer_norm_bwd_row(const LayerNormParams& p, const NormBuffers& t, i64 r, const float* weight, float* dw,
                               float* db) {
  if (p.dy.data) norm_slope(p, t, r, weight, dw, db);
  else __builtin_memset(t.g, 0, size_t(p.C) * 4);
  if (p.dtotal.data) {
    const float* d = read_row(row(p.dtotal, r), p.dtotal.dtype, p.C, t.y);
    for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      store_lanes(t.g + c, load_lanes(t.g + c, n) + load_lanes(d + c, n), n);
    });
  }
  if (p.dresidual.data) {
    float* out = write_row(row(p.dresidual, r), p.dresidual.dtype, t.g);
    if (out != t.g) __builtin_memcpy(out, t.g, size_t(p.C) * 4);
    finish_row(row(p.dresidual, r), p.dresidual.dtype, out, p.C);
  }
  if (!p.dx.data) return;
  float* dx = write_row(row(p.dx, r), p.dx.dtype, t.y);
  const DropoutParams& d = p.dropout;
  if (d.threshold) {
    dropout_lanes(t.lanes, d, 0, r, 0, p.C);
    const float scale = dropout_scale(d);
    for_lanes(p.C, [&](i64 c, i64 n) __attribute__((always_inline)) {
      store_lanes(dx + c, drop(load_lanes(t.g + c, n), t.lanes + c, d.threshold, scale), n);
    });
  } else {
    __builtin_memcpy(dx, t.g, size_t(p.C) * 4);
  }
  finish_row(row(p.dx, r), p.dx.dtype, dx, p.C);
}

static void layer_norm_bwd(const LayerNormParams& p, i64 chunk_begin, i64 chunk_end) {
  const NormBuffers t(p.C);
  const float* weight = read_row(p.weight.data, p.weight.dtype, p.C, t.weight);
  for (i64 k = chunk_begin; k < chunk_end; k++) {
    float *dw = p.dweight + k * p.C, *db = p.dbias ? p.dbias + k * p.C : nullptr;
    __builtin_memset(dw, 0, size_t(p.C) * 4);
    if (db) __builtin_memset(db, 0, size_t(p.C) * 4);
    const i64 end = (k + 1) * kRowChunk < p.R ? (k + 1) * kRowChunk : p.R;
    for (i64 r = k * kRowChunk; r < end; r++) layer_norm_bwd_row(p, t, r, weight, dw, db);
  }
}
