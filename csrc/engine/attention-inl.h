// Attention of new positions to the pages of keys and values that their row holds.
//
// Scores of a page: its 64 keys lie side by side for each channel, so there are no sums across lanes. The softmax runs
// over whole pages, with -inf outside what a query sees; the values follow position by position. A query thus computes
// the same, to the bit, alone or beside others: what it does not see adds exact zeros.
//
// With one query the floor is the read of the pages, and a jump to another page costs as much as the read of 8 KB. So
// the heads of a page are read one after the other, and each line is asked for one head ahead.
#include "tiles-inl.h"

constexpr int kAttendVectors = L == 16 ? 4 : 2;

template <DType T> INL F load_cached(const char* p, i64 element) {
  if constexpr (T == DType::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + element);
  if constexpr (T == DType::f16) return load_f16(reinterpret_cast<const uint16_t*>(p) + element);
  return load(reinterpret_cast<const float*>(p) + element);
}

// In 16 bits, whole vectors; fp16 holds at most 65504, and nothing becomes infinite by being kept.
template <DType T> INL void narrow_cached(uint16_t* out, const float* x, i64 D) {
  const F most = set(T == DType::f16 ? 65504.f : 3.38e38f);  // nan stays: min and max give their second argument
  for_lanes(D, [&](i64 d, i64 n) {
    const F kept = min(most, max(zero() - most, load_lanes(x + d, n)));
    T == DType::f16 ? store_f16(out + d, kept) : store_bf16(out + d, kept);
  });
}
// The keys and the values of head h in the page that holds a position.
template <DType T> INL char* keys_of(const AttendParams& p, i64 h, i64 at) {
  return p.pages[at / kPage] + p.keys + h * key_elements(p.D) * element_size(T);
}
template <DType T> INL char* values_of(const AttendParams& p, i64 h, i64 at) {
  return p.pages[at / kPage] + p.values + h * value_elements(p.D) * element_size(T);
}

template <DType T> INL void store_position(const float* k, const float* v, i64 D, i64 at, char* keys, char* values) {
  const i64 Dp = padded_head(D), size = element_size(T);
  values += at * Dp * size;
  if constexpr (T != DType::f32) {
    alignas(64) uint16_t narrow[256];
    narrow_cached<T>(narrow, k, D);
    for (i64 d = 0; d < D; d++) reinterpret_cast<uint16_t*>(keys)[d * kPage + at] = narrow[d];
    narrow_cached<T>(reinterpret_cast<uint16_t*>(values), v, D);
  } else {
    for (i64 d = 0; d < D; d++) reinterpret_cast<float*>(keys)[d * kPage + at] = k[d];
    __builtin_memcpy(values, v, size_t(D) * 4);
  }
  for (i64 d = D; d < Dp; d++) __builtin_memset(values + d * size, 0, size_t(size));
}
template <DType T> static void store_run(const AttendParams& p) {
  if (p.n == 1) prefetch_range(keys_of<T>(p, 0, p.start), p.heads * key_elements(p.D) * element_size(T));
  for (i64 h = 0; h < p.heads; h++)
    for (i64 i = 0; i < p.n; i++)
      store_position<T>(p.k + i * p.stride + h * p.D, p.v + i * p.stride + h * p.D, p.D, (p.start + i) % kPage,
                        keys_of<T>(p, h, p.start + i), values_of<T>(p, h, p.start + i));
}
static void store_kv(const AttendParams& p) {
  switch (p.cache) {
    case DType::f32: return store_run<DType::f32>(p);
    case DType::f16: return store_run<DType::f16>(p);
    case DType::bf16: return store_run<DType::bf16>(p);
  }
}

// out[r][0..64) = scale q[r] . keys of a page; `after` is read next.
template <DType T, int R>
static void page_scores(const char* keys, const char* after, const float* q, i64 ldq, i64 D, float scale, float* out,
                        i64 ldo) {
  constexpr i64 kBytes = kPage * element_size(T);
  constexpr int V = kAttendVectors;
  for (i64 c = 0; c < kPage; c += V * L) {
    F acc[R][V];
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
    for (i64 d = 0; d < D; d++) {
      if (R == 1 && c == 0) prefetch_range(after + d * kBytes, kBytes);
      F k[V];
      UNROLL_FOR (int v = 0; v < V; v++) k[v] = load_cached<T>(keys, d * kPage + c + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F a = set(q[r * ldq + d]);
        UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, k[v], acc[r][v]);
      }
    }
    UNROLL_FOR (int r = 0; r < R; r++)
      UNROLL_FOR (int v = 0; v < V; v++) store(out + r * ldo + c + v * L, acc[r][v] * set(scale));
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

// out[r][d0 + v L ...) += sum over positions [begin, end) of weights[r][position - begin] values[position][d0 + v L
// ...), of head h; `fresh`: out counts as 0. `after` is read next.
template <DType T, int R, int V>
static void weigh_values(const AttendParams& p, i64 h, i64 begin, i64 end, const char* after, const float* weights,
                         i64 ldw, i64 d0, bool fresh, float* out) {
  const i64 Dp = padded_head(p.D), size = element_size(T);
  const auto lanes = [&](int v) {  // of a vector that count
    const i64 left = p.D - d0 - v * L;
    return left < 0 ? 0 : left < L ? left : i64(L);
  };
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++)
      acc[r][v] = fresh ? zero() : load_lanes(out + r * p.out_stride + d0 + v * L, lanes(v));
  for (i64 page = begin; page < end; page += kPage) {
    const char* values = values_of<T>(p, h, page);
    const char* next = page + kPage < end ? values_of<T>(p, h, page + kPage) : after;
    const float* w = weights + (page - begin);
    const i64 n = end - page < kPage ? end - page : kPage;
    for (i64 i = 0; i < n; i++) {
      if (R == 1) prefetch_range(next + (i * Dp + d0) * size, V * L * size);
      F x[V];
      UNROLL_FOR (int v = 0; v < V; v++) x[v] = load_cached<T>(values, i * Dp + d0 + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F a = set(w[r * ldw + i]);
        UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, x[v], acc[r][v]);
      }
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store_lanes(out + r * p.out_stride + d0 + v * L, acc[r][v], lanes(v));
}

template <DType T, int R>
INL void accumulate_pv(const AttendParams& p, i64 h, i64 begin, i64 end, const char* after, const float* weights,
                       i64 ldw, bool fresh, float* out) {
  constexpr int V = kAttendVectors;
  i64 d = 0;
  for (; d + V * L <= padded_head(p.D); d += V * L)
    weigh_values<T, R, V>(p, h, begin, end, after, weights, ldw, d, fresh, out);
  for (; d < p.D; d += L) weigh_values<T, R, 1>(p, h, begin, end, after, weights, ldw, d, fresh, out);
}

// Queries row .. row + R of the run, page by page: the heads of a page lie side by side.
template <DType T, int R> static void attend_rows(const AttendParams& p, i64 row) {
  const i64 oldest = p.start + row, end = oldest + R;
  const i64 first = p.window && oldest >= p.window ? (oldest - p.window + 1) / kPage * kPage : 0;
  const i64 n = (end - first + kPage - 1) / kPage * kPage;
  float *const scores = p.scratch, *const total = scores + p.heads * R * n;
  const float* q = p.q + row * p.stride;
  float* out = p.out + row * p.out_stride;
  for (i64 at = first; at < end; at += kPage)
    for (i64 h = 0; h < p.heads; h++) {
      const char* after = h + 1 < p.heads    ? keys_of<T>(p, h + 1, at)
                          : at + kPage < end ? keys_of<T>(p, 0, at + kPage)
                                             : values_of<T>(p, 0, first);
      page_scores<T, R>(keys_of<T>(p, h, at), after, q + h * p.D, p.stride, p.D, p.scale,
                        scores + h * R * n + (at - first), n);
    }
  for (i64 h = 0; h < p.heads; h++)
    for (int r = 0; r < R; r++) {
      const i64 position = oldest + r, low = p.window && position >= p.window ? position - p.window + 1 : 0;
      total[h * R + r] = exponentials(scores + (h * R + r) * n, n, low > first ? low - first : 0, position + 1 - first);
    }
  const i64 stretch = p.heads == 1 ? n : kPage;
  for (i64 at = first; at < end; at += stretch)
    for (i64 h = 0; h < p.heads; h++) {
      const i64 to = at + stretch < end ? at + stretch : end;
      const char* after = h + 1 < p.heads || to == end ? values_of<T>(p, h + 1, at) : values_of<T>(p, 0, to);
      accumulate_pv<T, R>(p, h, at, to, after, scores + h * R * n + (at - first), n, at == first, out + h * p.D);
    }
  for (i64 h = 0; h < p.heads; h++)
    for (int r = 0; r < R; r++) {
      float* y = out + r * p.out_stride + h * p.D;
      const F inverse = set(1.f / total[h * R + r]);
      for_lanes(p.D, [&](i64 d, i64 lanes) { store_lanes(y + d, load_lanes(y + d, lanes) * inverse, lanes); });
    }
}
template <DType T> static void attend_run(const AttendParams& p) {
  rows_of_tiles<kAttendRows>(p.n, [&]<int R>(i64 row) { attend_rows<T, R>(p, row); });
}
static void attend(const AttendParams& p) {
  switch (p.cache) {
    case DType::f32: return attend_run<DType::f32>(p);
    case DType::f16: return attend_run<DType::f16>(p);
    case DType::bf16: return attend_run<DType::bf16>(p);
  }
}

static void fill(Kernels& k) {
  k.store_kv = store_kv;
  k.attend = attend;
}
