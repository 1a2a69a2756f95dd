// GELU of x + bias (Hendrycks and Gimpel, arXiv 1606.08415), forward and backward.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//
// Floor: one read and one write of x (backward: two reads and one write); about 20 (tanh) and 40 (exact) vector
// operations a vector, below the memory time outside the cache.

constexpr i64 kGeluBlock = 2048;  // values converted at a time: 8 KB, so that half-precision scratch stays in L1

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

template <bool TANH> static void gelu_fwd_rows(const GeluParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float xs[kGeluBlock], bs[kGeluBlock], ys[kGeluBlock];
  for (i64 r = row_begin; r < row_end; r++) {
    const i64 C = r == p.R - 1 ? p.tail : p.C;
    for (i64 c0 = 0; c0 < C; c0 += kGeluBlock) {
      const i64 n = C - c0 < kGeluBlock ? C - c0 : kGeluBlock;
      const float* x = read_row(at(row(p.x, r), p.x.dtype, c0), p.x.dtype, n, xs);
      const float* b = p.bias.data ? read_row(at(p.bias.data, p.bias.dtype, c0), p.bias.dtype, n, bs) : nullptr;
      void* out = at(row(p.out, r), p.out.dtype, c0);
      float* y = write_row(out, p.out.dtype, ys);
      for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
        F z = load_lanes(x + c, k);
        if (b) z = z + load_lanes(b + c, k);
        store_lanes(y + c, gelu_value<TANH>(z), k);
      });
      finish_row(out, p.out.dtype, y, n);
    }
  }
}
static void gelu_fwd(const GeluParams& p, i64 row_begin, i64 row_end) {
  if (p.tanh) gelu_fwd_rows<true>(p, row_begin, row_end);
  else gelu_fwd_rows<false>(p, row_begin, row_end);
}

template <bool TANH> static void gelu_bwd_chunk(const GeluParams& p, i64 chunk) {
  alignas(64) float xs[kGeluBlock], bs[kGeluBlock], gs[kGeluBlock], ds[kGeluBlock];
  const i64 r0 = chunk * kRowChunk, r1 = r0 + kRowChunk < p.R ? r0 + kRowChunk : p.R;
  for (i64 c0 = 0; c0 < p.C; c0 += kGeluBlock) {
    const i64 width = p.C - c0 < kGeluBlock ? p.C - c0 : kGeluBlock;
    const float* b = p.bias.data ? read_row(at(p.bias.data, p.bias.dtype, c0), p.bias.dtype, width, bs) : nullptr;
    float* db = p.dbias ? p.dbias + chunk * p.C + c0 : nullptr;
    if (db) __builtin_memset(db, 0, size_t(width) * 4);
    for (i64 r = r0; r < r1; r++) {
      const i64 C = r == p.R - 1 ? p.tail : p.C, n = C - c0 < width ? C - c0 : width;
      if (n <= 0) break;
      const float* x = read_row(at(row(p.x, r), p.x.dtype, c0), p.x.dtype, n, xs);
      const float* g = read_row(at(row(p.dout, r), p.dout.dtype, c0), p.dout.dtype, n, gs);
      void* out = at(row(p.out, r), p.out.dtype, c0);
      float* dx = write_row(out, p.out.dtype, ds);
      for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
        F z = load_lanes(x + c, k);
        if (b) z = z + load_lanes(b + c, k);
        const F d = load_lanes(g + c, k) * gelu_slope<TANH>(z);
        store_lanes(dx + c, d, k);
        if (db) store_lanes(db + c, load_lanes(db + c, k) + d, k);
      });
      finish_row(out, p.out.dtype, dx, n);
    }
  }
}
static void gelu_bwd(const GeluParams& p, i64 chunk_begin, i64 chunk_end) {
  for (i64 k = chunk_begin; k < chunk_end; k++) {
    if (p.tanh) gelu_bwd_chunk<true>(p, k);
    else gelu_bwd_chunk<false>(p, k);
  }
}
