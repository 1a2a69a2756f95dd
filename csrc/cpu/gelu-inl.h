// GELU of x + bias (Hendrycks and Gimpel, arXiv 1606.08415), forward and backward.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//
// Floor: one read and one write of x (backward: two reads and one write); about 20 (tanh) and 40 (exact) vector
// operations a vector, below the memory time outside the cache.

constexpr i64 kGeluBlock = 2048;  // columns at a time: bias and its gradient stay in L1

// e^-2u
INL F gelu_decay(F z, F z2) {
  return exp2<6>(z * set(-2.f * 0.7978845608f * 1.4426950409f) * fma(z2, set(0.044715f), set(1.f)));
}
template <bool TANH> INL F gelu_value(F z) {
  if constexpr (TANH) return z / (set(1.f) + gelu_decay(z, z * z));
  const F half = set(0.5f) * z;
  return fma(half, erf(z * set(0.70710678f)), half);
}
template <bool TANH> INL F gelu_slope(F z) {
  if constexpr (TANH) {
    z = min(set(10.f), max(set(-10.f), z));  // beyond, the slope is 1 or below 1e-34; keeps inf * 0 away
    const F z2 = z * z, decay = gelu_decay(z, z2), s = set(1.f) / (set(1.f) + decay);
    const F two_du = fma(z2, set(6.f * 0.7978845608f * 0.044715f), set(2.f * 0.7978845608f));
    return fma(z * two_du, decay * s * s, s);
  }
  const F cdf = fma(set(0.5f), erf(z * set(0.70710678f)), set(0.5f));
  const F pdf = set(0.3989422804f) * exp2<6>(z * z * set(-0.5f * 1.4426950409f));
  return fma(z, pdf, cdf);
}

// Columns [c0, c0 + n) of a row: f(c, z, lanes that count) with z = x + bias.
template <DType T, class Fn> INL void gelu_columns(const void* x, const float* bias, i64 c0, i64 n, Fn f) {
  for_lanes(n, [=](i64 c, i64 k) __attribute__((always_inline)) {
    const F z = load_as<T>(x, c0 + c, k);
    f(c, bias ? z + load_lanes(bias + c, k) : z, k);
  });
}
INL const float* gelu_bias(const GeluParams& p, i64 c0, i64 n, float* buffer) {
  return p.bias.data ? read_row(at(p.bias.data, p.bias.dtype, c0), p.bias.dtype, n, buffer) : nullptr;
}

template <DType T, bool TANH> static void gelu_fwd_rows(const GeluParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float buffer[kGeluBlock];
  const bool past = p.out.stream;
  for (i64 c0 = 0; c0 < p.C; c0 += kGeluBlock) {
    const i64 width = p.C - c0 < kGeluBlock ? p.C - c0 : kGeluBlock;
    const float* bias = gelu_bias(p, c0, width, buffer);
    for (i64 r = row_begin; r < row_end; r++) {
      const i64 C = r == p.R - 1 ? p.tail : p.C, n = C - c0 < width ? C - c0 : width;
      void* y = row(p.out, r);
      gelu_columns<T>(row(p.x, r), bias, c0, n, [=](i64 c, F z, i64 k) __attribute__((always_inline)) {
        put_as<T>(past, y, c0 + c, gelu_value<TANH>(z), k);
      });
    }
  }
}
static void gelu_fwd(const GeluParams& p, i64 row_begin, i64 row_end) {
  with_dtype(p.x.dtype, [&](auto t) {
    p.tanh ? gelu_fwd_rows<t.value, true>(p, row_begin, row_end) : gelu_fwd_rows<t.value, false>(p, row_begin, row_end);
  });
  stream_end();
}

template <DType T, bool TANH> static void gelu_bwd_chunk(const GeluParams& p, i64 chunk) {
  alignas(64) float buffer[kGeluBlock];
  const i64 r0 = chunk * kRowChunk, r1 = r0 + kRowChunk < p.R ? r0 + kRowChunk : p.R;
  const bool past = p.out.stream;
  for (i64 c0 = 0; c0 < p.C; c0 += kGeluBlock) {
    const i64 width = p.C - c0 < kGeluBlock ? p.C - c0 : kGeluBlock;
    const float* bias = gelu_bias(p, c0, width, buffer);
    float* db = p.dbias ? p.dbias + chunk * p.C + c0 : nullptr;
    if (db) __builtin_memset(db, 0, size_t(width) * 4);
    for (i64 r = r0; r < r1; r++) {
      const i64 C = r == p.R - 1 ? p.tail : p.C, n = C - c0 < width ? C - c0 : width;
      const void* dy = row(p.dout, r);
      void* dx = row(p.out, r);
      gelu_columns<T>(row(p.x, r), bias, c0, n, [=](i64 c, F z, i64 k) __attribute__((always_inline)) {
        const F d = load_as<T>(dy, c0 + c, k) * gelu_slope<TANH>(z);
        put_as<T>(past, dx, c0 + c, d, k);
        if (db) store_lanes(db + c, load_lanes(db + c, k) + d, k);
      });
    }
  }
}
static void gelu_bwd(const GeluParams& p, i64 chunk_begin, i64 chunk_end) {
  with_dtype(p.x.dtype, [&](auto t) {
    for (i64 k = chunk_begin; k < chunk_end; k++)
      p.tanh ? gelu_bwd_chunk<t.value, true>(p, k) : gelu_bwd_chunk<t.value, false>(p, k);
  });
  stream_end();
}
