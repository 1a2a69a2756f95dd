// GELU of x + bias (Hendrycks and Gimpel, arXiv 1606.08415), forward and backward.
//
//   exact   y = z Phi(z),            dy/dz = Phi(z) + z phi(z)
//   tanh    y = z s,  s = sigmoid(2u), u = sqrt(2/pi) (z + 0.044715 z^3)   [0.5 (1 + tanh u) = sigmoid(2u)]
//           dy/dz = s + z s (1 - s) 2u',  with 1 - s = e^-2u s, which does not cancel where s is near 1
//
// Floor: one read and one write of x (backward: two reads and one write); about 20 (tanh) and 40 (exact) vector
// operations a vector, below the memory time outside the cache.

template <int N> struct Count {
  static constexpr int value = N;
};
constexpr i64 kGeluBlock = 2048;  // columns at a time: bias and its gradient stay in L1

// e^-2u. What becomes bf16 does with less: 2^-9 is half its last place.
template <DType T> INL F gelu_decay(F z, F z2) {
  constexpr int kDegree = T == DType::bf16 ? 4 : 6;
  return exp2<kDegree>(z * set(-2.f * 0.7978845608f * 1.4426950409f) * fma(z2, set(0.044715f), set(1.f)));
}
template <DType T> INL F gelu_sigmoid(F decay) {
  const F x = set(1.f) + decay;
  return T == DType::bf16 ? coarse_reciprocal(x) : reciprocal(x);
}
template <DType T, bool TANH> INL F gelu_value(F z) {
  if constexpr (TANH) return z * gelu_sigmoid<T>(gelu_decay<T>(z, z * z));
  const F half = set(0.5f) * z;
  return fma(half, erf(z * set(0.70710678f)), half);
}
template <DType T, bool TANH> INL F gelu_slope(F z) {
  if constexpr (TANH) {
    z = min(set(10.f), max(set(-10.f), z));  // beyond, the slope is 1 or below 1e-34; keeps inf * 0 away
    const F z2 = z * z, decay = gelu_decay<T>(z, z2), s = gelu_sigmoid<T>(decay);
    const F two_du = fma(z2, set(6.f * 0.7978845608f * 0.044715f), set(2.f * 0.7978845608f));
    return fma(z * two_du, decay * s * s, s);
  }
  const F cdf = fma(set(0.5f), erf(z * set(0.70710678f)), set(0.5f));
  const F pdf = set(0.3989422804f) * exp2<6>(z * z * set(-0.5f * 1.4426950409f));
  return fma(z, pdf, cdf);
}

// Columns [c0, c0 + n) of rows r .. r + ROWS - 1: f(u, c, z, lanes that count) with z = x + bias of row r + u.
template <DType T, int ROWS, class Fn>
INL void gelu_columns(const GeluParams& p, i64 r, const float* bias, i64 c0, i64 n, Fn f) {
  const void* x[ROWS];
  for (int u = 0; u < ROWS; u++) x[u] = row(p.x, r + u);
  for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
    UNROLL_FOR (int u = 0; u < ROWS; u++) {
      const F z = load_as<T>(x[u], c0 + c, k);
      f(u, c, bias ? z + load_lanes(bias + c, k) : z, k);
    }
  });
}
// f(r, rows, n) over rows by twos: two streams from memory are faster than one (3.5 -> 2.9 ms at 4096 x 3072 fp32). The
// last row of all may be short, and stands alone: n columns from c0 on.
template <class Fn> INL void gelu_rows(const GeluParams& p, i64 begin, i64 end, i64 c0, i64 width, Fn f) {
  i64 r = begin;
  for (; r + 2 <= end && r + 2 < p.R; r += 2) f(r, Count<2>(), width);
  for (; r < end; r++) {
    const i64 C = r == p.R - 1 ? p.tail : p.C;
    f(r, Count<1>(), C - c0 < width ? C - c0 : width);
  }
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
    gelu_rows(p, row_begin, row_end, c0, width, [&](i64 r, auto rows, i64 n) __attribute__((always_inline)) {
      void* y[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
      gelu_columns<T, rows.value>(p, r, bias, c0, n, [&](int u, i64 c, F z, i64 k) __attribute__((always_inline)) {
        put_as<T>(past, y[u], c0 + c, gelu_value<T, TANH>(z), k);
      });
    });
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
    gelu_rows(p, r0, r1, c0, width, [&](i64 r, auto rows, i64 n) __attribute__((always_inline)) {
      const void* dy[] = {row(p.dout, r), row(p.dout, r + rows.value - 1)};
      void* dx[] = {row(p.out, r), row(p.out, r + rows.value - 1)};
      F sum = zero();
      gelu_columns<T, rows.value>(p, r, bias, c0, n, [&](int u, i64 c, F z, i64 k) __attribute__((always_inline)) {
        const F d = load_as<T>(dy[u], c0 + c, k) * gelu_slope<T, TANH>(z);
        put_as<T>(past, dx[u], c0 + c, d, k);
        if (!db) return;
        sum = u ? sum + d : d;
        if (u == rows.value - 1) store_lanes(db + c, load_lanes(db + c, k) + sum, k);
      });
    });
  }
}
static void gelu_bwd(const GeluParams& p, i64 chunk_begin, i64 chunk_end) {
  with_dtype(p.x.dtype, [&](auto t) {
    for (i64 k = chunk_begin; k < chunk_end; k++)
      p.tanh ? gelu_bwd_chunk<t.value, true>(p, k) : gelu_bwd_chunk<t.value, false>(p, k);
  });
  stream_end();
}
