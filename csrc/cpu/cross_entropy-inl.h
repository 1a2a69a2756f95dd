// Cross-entropy of rows of logits, forward and backward.
//
//   lse = m + s,  m = max_v x_v,  s = log sum_v exp(x_v - m)
//   loss = (1 - e) (m - x_target + s) + e (m - mean_v x_v + s)      e: label smoothing
//   dx_v = g (exp(x_v - m - s) - (1 - e) [v = target] - e / V)      g: gradient of this row's loss
//
// m and s are kept apart: their sum would round away what a confident row, or one with a large common offset, is about.
// Floor: one read of the logits forward, one read and one write backward. The maximum runs along with the sum, block by
// block (Milakov and Gimelshein, arXiv 1805.02867), so that a row comes from memory once.

constexpr i64 kLossBlock = 2048;

template <DType T> INL float block_max(const void* x, i64 n) {
  F m[2] = {set(-__builtin_inff()), set(-__builtin_inff())};  // nan passes by and shows up in the sum
  for_lanes_paired<T>(n, [&](i64 c, i64 k, int u) __attribute__((always_inline)) {
    const F value = load_as<T>(x, c, k);
    m[u] = max(k == L ? value : select(first_n(k), value, m[u]), m[u]);
  });
  return hmax(max(m[0], m[1]));
}

// The statistics of a row, block by block.
struct LossRow {
  float top = -__builtin_inff(), total = 0.f;  // maximum, sum of exp(x - top)
  float origin = 0.f, shifted = 0.f;           // sum of x - origin, for label smoothing

  template <DType T> void add(const void* x, i64 n, bool smooth, bool first) {
    const float high = block_max<T>(x, n);
    if (high > top) {
      total *= top == -__builtin_inff() ? 0.f : __builtin_expf(top - high);
      top = high;
    }
    const float level = top == -__builtin_inff() ? 0.f : top;
    const F center = set(level), log2e = set(kLog2e);
    total += row_sum<T>(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F e = exp2<6>((load_as<T>(x, c, k) - center) * log2e);
      return k == L ? e : select_or_zero(first_n(k), e);
    });
    if (!smooth) return;
    if (first) origin = level;
    const F from = set(origin);
    shifted += row_sum<T>(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F d = load_as<T>(x, c, k) - from;
      return k == L ? d : select_or_zero(first_n(k), d);
    });
  }
};

template <DType T> APART static void cross_entropy_fwd_row(const CrossEntropyParams& p, i64 r) {
  const i64 target = p.targets[r];
  const float e = p.label_smoothing;
  const void* x = row(p.logits, r);
  p.loss[r] = p.lse[2 * r] = p.lse[2 * r + 1] = 0.f;
  if (target == p.ignore_index) return;
  LossRow s;
  for (i64 v = 0; v < p.V; v += kLossBlock)
    s.add<T>(at(x, T, v), p.V - v < kLossBlock ? p.V - v : kLossBlock, e != 0.f, v == 0);
  const float log_total = __builtin_logf(s.total);
  float picked[L];
  store(picked, load_as<T>(x, target, 1));
  p.lse[2 * r] = s.top;
  p.lse[2 * r + 1] = log_total;
  p.loss[r] = (1.f - e) * (s.top - picked[0] + log_total);
  if (e != 0.f) p.loss[r] += e * (s.top - s.origin - s.shifted / float(p.V) + log_total);
}

template <DType T> APART static void cross_entropy_bwd_row(const CrossEntropyParams& p, i64 r) {
  const i64 target = p.targets[r];
  const void* x = row(p.logits, r);
  void* d = row(p.dlogits, r);
  if (target == p.ignore_index) {
    __builtin_memset(d, 0, size_t(p.V * element_size(T)));
    return;
  }
  const float g = p.dloss ? p.dloss[r] : 1.f, e = p.label_smoothing;
  const F top = set(p.lse[2 * r]), log2_total = set(p.lse[2 * r + 1] * kLog2e), log2e = set(kLog2e), scale = set(g);
  const F even = set(g * e / float(p.V));
  const auto slope = [=](i64 c, i64 k) __attribute__((always_inline)) {
    return exp2<6>(fma(load_as<T>(x, c, k) - top, log2e, zero() - log2_total)) * scale - even;
  };
  const bool past = p.dlogits.non_temporal;
  float at_target[L];  // before x is overwritten where it is d
  store(at_target, slope(target, 1));
  for_lanes<T>(p.V, [=](i64 c, i64 k) __attribute__((always_inline)) { put_as<T>(past, d, c, slope(c, k), k); });
  if (past) stream_end();  // before the same line is written once more
  store_as<T>(d, target, set(at_target[0] - g * (1.f - e)), 1);
}

static void cross_entropy_fwd(const CrossEntropyParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.logits.dtype)) return base.cross_entropy_fwd(p, row_begin, row_end);
  for (i64 r = row_begin; r < row_end; r++)
    with_own_dtype(p.logits.dtype, [&](auto t) { cross_entropy_fwd_row<t.value>(p, r); });
}
static void cross_entropy_bwd(const CrossEntropyParams& p, i64 row_begin, i64 row_end) {
  if (is_left_to_base(p.logits.dtype)) return base.cross_entropy_bwd(p, row_begin, row_end);
  for (i64 r = row_begin; r < row_end; r++)
    with_own_dtype(p.logits.dtype, [&](auto t) { cross_entropy_bwd_row<t.value>(p, r); });
}

static void fill(Kernels& k) {
  k.cross_entropy_fwd = cross_entropy_fwd;
  k.cross_entropy_bwd = cross_entropy_bwd;
}
