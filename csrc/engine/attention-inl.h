// Attention of new positions to the pages of keys and values that their row holds.
//
// Scores of a page: its 64 keys lie side by side for each channel, so there are no sums across lanes. The softmax runs
// over whole pages, with -inf outside what a query sees; the values follow position by position. A query thus computes
// the same, to the bit, alone or beside others: what it does not see adds exact zeros.
// The products are kernels of their own: page_scores-inl.h, page_values-inl.h.
//
// With one query the floor is the read of the pages, and a jump to another page costs as much as the read of 8 KB. So
// the heads of a page are read one after the other, and each line is asked for one head ahead.
#include "activation-inl.h"
#include "pages-inl.h"

// In 16 bits, whole vectors; fp16 holds at most 65504, and nothing becomes infinite by being kept.
template <DType T> INL void narrow_cached(uint16_t* out, const float* x, i64 D) {
  const F most = set(T == DType::f16 ? 65504.f : 3.38e38f);  // nan stays: min and max give their second argument
  for_lanes(D, [&](i64 d, i64 n) {
    const F kept = min(most, max(zero() - most, load_lanes(x + d, n)));
    T == DType::f16 ? store_f16(out + d, kept) : store_bf16(out + d, kept);
  });
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

// scores[0..n) -> exp(scores - max) where [low, high) counts, else 0; returns the sum. n is a multiple of 64. sink: null, or
// one more score that counts in max and sum.
static float exponentials(float* scores, i64 n, i64 low, i64 high, float softcap, const float* sink) {
  if (softcap > 0.f) {
    const F cap = set(softcap), inverse = set(1.f / softcap);
    for (i64 i = low / L * L; i < high; i += L) store(scores + i, cap * tanh(load(scores + i) * inverse));
  }
  for (i64 i = 0; i < low; i++) scores[i] = -__builtin_inff();
  for (i64 i = high; i < n; i++) scores[i] = -__builtin_inff();
  F top = set(-__builtin_inff());
  for (i64 i = 0; i < n; i += L) top = max(top, load(scores + i));
  const F most = set(sink ? hmax(max(top, set(*sink))) : hmax(top)), log2e = set(kLog2e);
  const float total = row_sum(n, [&](i64 i, i64) {
    const F e = exp2<6>((load(scores + i) - most) * log2e);
    store(scores + i, e);
    return e;
  });
  if (!sink) return total;
  alignas(64) float lanes[L];
  store(lanes, exp2<6>((set(*sink) - most) * log2e));
  return total + lanes[0];
}

// Queries row .. row + R of each head.
static void attend_rows(const Kernels& k, const AttendParams& p, i64 row, int R) {
  const i64 oldest = p.position(row), end = p.position(row + R - 1) + 1;
  const i64 first = p.window && oldest >= p.window ? (oldest - p.window + 1) / kPage * kPage : 0;
  const i64 n = (end - first + kPage - 1) / kPage * kPage;
  float *const scores = p.scratch, *const total = scores + p.heads * R * n;
  const AttendRows rows{p, row, first, end, n, scores};
  k.page_scores[int(p.cache)][R - 1](rows);
  for (i64 h = 0; h < p.heads; h++)
    for (int r = 0; r < R; r++) {
      const i64 position = p.position(row + r), low = p.window && position >= p.window ? position - p.window + 1 : 0;
      const float* sink = p.sinks ? p.sinks + (p.together ? h * p.n + row + r : h) : nullptr;
      total[h * R + r] = exponentials(scores + (h * R + r) * n, n, low > first ? low - first : 0, position + 1 - first,
                                      p.softcap, sink);
    }
  k.page_values[int(p.cache)][R - 1](rows);
  float* out = p.out + row * p.out_stride;
  for (i64 h = 0; h < p.heads; h++)
    for (int r = 0; r < R; r++) {
      float* y = out + r * p.out_stride + h * p.q_heads;
      const F inverse = set(1.f / total[h * R + r]);
      for_lanes(p.D, [&](i64 d, i64 lanes) { store_lanes(y + d, load_lanes(y + d, lanes) * inverse, lanes); });
    }
}
static void attend(const Kernels& k, const AttendParams& p) {
  i64 row = 0;
  for (; row + kAttendRows <= p.n; row += kAttendRows) attend_rows(k, p, row, int(kAttendRows));
  if (row < p.n) attend_rows(k, p, row, int(p.n - row));
}

static void fill(Kernels& k) {
  k.store_kv = store_kv;
  k.attend = attend;
}
