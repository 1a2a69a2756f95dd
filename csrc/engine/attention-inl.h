// Attention of new positions to the pages of keys and values that their row holds.
//
// Scores of a page: its 64 keys lie side by side for each channel, so there are no sums across lanes. The softmax runs
// over whole pages, with -inf outside what a query sees; the values follow position by position. A query thus computes
// the same, to the bit, alone or beside others: what it does not see adds exact zeros.

constexpr int kAttendVectors = L == 16 ? 4 : 2;

template <DType T>
INL F load_cached(const char* p, i64 element) {
  if constexpr (T == DType::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + element);
  if constexpr (T == DType::f16) return load_f16(reinterpret_cast<const uint16_t*>(p) + element);
  return load(reinterpret_cast<const float*>(p) + element);
}

// In 16 bits, whole vectors; fp16 holds at most 65504, and nothing becomes infinite by being kept.
template <DType T>
INL void narrow_cached(uint16_t* out, const float* x, i64 D) {
  const F most = set(T == DType::f16 ? 65504.f : 3.38e38f);  // nan stays: min and max give their second argument
  for_lanes(D, [&](i64 d, i64 n) {
    const F kept = min(most, max(zero() - most, load_lanes(x + d, n)));
    T == DType::f16 ? store_f16(out + d, kept) : store_bf16(out + d, kept);
  });
}
template <DType T>
static void store_run(const AttendParams& p) {
  const i64 Dp = padded_head(p.D), size = element_size(T);
  for (i64 i = 0; i < p.n; i++) {
    const i64 position = p.start + i, at = position % kPage;
    char* keys = p.pages[position / kPage] + p.offset;
    char* values = keys + p.D * kPage * size + at * Dp * size;
    const float *k = p.k + i * p.stride, *v = p.v + i * p.stride;
    if constexpr (T != DType::f32) {
      alignas(64) uint16_t narrow[256];
      narrow_cached<T>(narrow, k, p.D);
      for (i64 d = 0; d < p.D; d++) reinterpret_cast<uint16_t*>(keys)[d * kPage + at] = narrow[d];
      narrow_cached<T>(reinterpret_cast<uint16_t*>(values), v, p.D);
    } else {
      for (i64 d = 0; d < p.D; d++) reinterpret_cast<float*>(keys)[d * kPage + at] = k[d];
      __builtin_memcpy(values, v, size_t(p.D) * 4);
    }
    for (i64 d = p.D; d < Dp; d++) __builtin_memset(values + d * size, 0, size_t(size));
  }
}
static void store_kv(const AttendParams& p) {
  switch (p.cache) {
    case DType::f32: return store_run<DType::f32>(p);
    case DType::f16: return store_run<DType::f16>(p);
    case DType::bf16: return store_run<DType::bf16>(p);
  }
}

// out[r][0..64) = scale q[r] . keys of a page
template <DType T, int R>
static void page_scores(const char* keys, const float* q, i64 ldq, i64 D, float scale, float* out, i64 ldo) {
  constexpr int V = kAttendVectors;
  for (i64 c = 0; c < kPage; c += V * L) {
    F acc[R][V];
    UNROLL for (int r = 0; r < R; r++) UNROLL
      for (int v = 0; v < V; v++) acc[r][v] = zero();
    for (i64 d = 0; d < D; d++) {
      F k[V];
      UNROLL for (int v = 0; v < V; v++)
        k[v] = load_cached<T>(keys, d * kPage + c + v * L);
      UNROLL for (int r = 0; r < R; r++) {
        const F a = set(q[r * ldq + d]);
        UNROLL for (int v = 0; v < V; v++)
          acc[r][v] = fma(a, k[v], acc[r][v]);
      }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL
      for (int v = 0; v < V; v++) store(out + r * ldo + c + v * L, acc[r][v] * set(scale));
  }
}

// scores[0..n) -> exp(scores - max) where [low, high) counts, else 0; returns the sum. n is a multiple of 64.
static float exponentials(float* scores, i64 n, i64 low, i64 high) {
  for (i64 i = 0; i < low; i++) scores[i] = -__builtin_inff();
  for (i64 i = high; i < n; i++) scores[i] = -__builtin_inff();
  F top = set(-__builtin_inff());
  for (i64 i = 0; i < n; i += L) top = max(top, load(scores + i));
  const F most = set(hmax(top)), log2e = set(kLog2e);
  return row_sum(n, [&](i64 i, i64) {
    const F e = exp2<6>((load(scores + i) - most) * log2e);
    store(scores + i, e);
    return e;
  });
}

// acc[r][v] += sum over positions [first, end) of weights[r][position - first] values[position][d0 + v L ...)
template <DType T, int R, int V>
static void weigh_values(const AttendParams& p, const float* weights, i64 ldw, i64 first, i64 end, i64 d0,
                         const float* total, i64 row) {
  const i64 Dp = padded_head(p.D), size = element_size(T);
  F acc[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 at = first; at < end; at += kPage) {
    const char* values = p.pages[at / kPage] + p.offset + p.D * kPage * size;
    const float* w = weights + (at - first);
    const i64 n = end - at < kPage ? end - at : kPage;
    for (i64 i = 0; i < n; i++) {
      F x[V];
      UNROLL for (int v = 0; v < V; v++)
        x[v] = load_cached<T>(values, i * Dp + d0 + v * L);
      UNROLL for (int r = 0; r < R; r++) {
        const F a = set(w[r * ldw + i]);
        UNROLL for (int v = 0; v < V; v++)
          acc[r][v] = fma(a, x[v], acc[r][v]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) {
    const F inverse = set(1.f / total[r]);
    UNROLL for (int v = 0; v < V; v++) {
      const i64 d = d0 + v * L, left = p.D - d;
      if (left > 0) store_lanes(p.out + (row + r) * p.out_stride + d, acc[r][v] * inverse, left < L ? left : L);
    }
  }
}

// Queries row .. row + R of the run.
template <DType T, int R>
static void attend_rows(const AttendParams& p, i64 row) {
  const i64 last = p.start + row + R - 1, end = last + 1, oldest = p.start + row;
  const i64 first = p.window && oldest >= p.window ? (oldest - p.window + 1) / kPage * kPage : 0;
  const i64 n = (end - first + kPage - 1) / kPage * kPage;
  float total[R];
  for (i64 at = first; at < end; at += kPage)
    page_scores<T, R>(p.pages[at / kPage] + p.offset, p.q + row * p.stride, p.stride, p.D, p.scale,
                      p.scratch + (at - first), n);
  for (int r = 0; r < R; r++) {
    const i64 position = oldest + r, low = p.window && position >= p.window ? position - p.window + 1 : 0;
    total[r] = exponentials(p.scratch + r * n, n, low > first ? low - first : 0, position + 1 - first);
  }
  constexpr int V = kAttendVectors;
  i64 d = 0;
  for (; d + V * L <= padded_head(p.D); d += V * L) weigh_values<T, R, V>(p, p.scratch, n, first, end, d, total, row);
  for (; d < p.D; d += L) weigh_values<T, R, 1>(p, p.scratch, n, first, end, d, total, row);
}
template <DType T>
static void attend_run(const AttendParams& p) {
  rows_of_tiles<kAttendRows>(p.n, [&]<int R>(i64 row) { attend_rows<T, R>(p, row); });
}
static void attend(const AttendParams& p) {
  switch (p.cache) {
    case DType::f32: return attend_run<DType::f32>(p);
    case DType::f16: return attend_run<DType::f16>(p);
    case DType::bf16: return attend_run<DType::bf16>(p);
  }
}
