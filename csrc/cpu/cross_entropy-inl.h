// Cross-entropy of rows of logits, forward and backward.
//
//   lse = log sum_v exp(x_v)
//   loss = (1 - e) (lse - x_target) + e (lse - mean_v x_v)          e: label smoothing
//   dx_v = g (exp(x_v - lse) - (1 - e) [v = target] - e / V)        g: gradient of this row's loss
//
// Floor: one read of the logits forward, one read and one write backward. The maximum runs along with the sum, chunk by
// chunk (arXiv 1805.02867), so that a row comes from memory once.

constexpr i64 kLossBlock = 2048;

static void cross_entropy_fwd(const CrossEntropyParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float buffer[kLossBlock];
  for (i64 r = row_begin; r < row_end; r++) {
    float top = -__builtin_inff(), total = 0.f, plain = 0.f;
    for (i64 v0 = 0; v0 < p.V; v0 += kLossBlock) {
      const i64 n = p.V - v0 < kLossBlock ? p.V - v0 : kLossBlock;
      const float* x = read_row(at(row(p.logits, r), p.logits.dtype, v0), p.logits.dtype, n, buffer);
      F m0 = set(-__builtin_inff());  // nan passes it by and shows up in the sum
      for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F value = load_lanes(x + c, k);
        m0 = max(m0, k == L ? value : select(first_n(k), value, m0));
      });
      const float higher = hmax(m0);
      if (higher > top) {
        total *= top == -__builtin_inff() ? 0.f : __builtin_expf(top - higher);
        top = higher;
      }
      const F shift = set(top == -__builtin_inff() ? 0.f : top * kLog2e), log2e = set(kLog2e);
      total += row_sum(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F e = exp2<6>(fma(load_lanes(x + c, k), log2e, zero() - shift));
        return k == L ? e : keep(first_n(k), e);
      });
      if (p.label_smoothing != 0.f)
        plain += row_sum(n, [&](i64 c, i64 k) __attribute__((always_inline)) { return load_lanes(x + c, k); });
    }
    const float lse = top + __builtin_logf(total);
    p.lse[r] = lse;
    const i64 target = p.targets[r];
    if (target == p.ignore_index) {
      p.loss[r] = 0.f;
      continue;
    }
    float picked[L];
    store(picked, load_any(at(row(p.logits, r), p.logits.dtype, target), p.logits.dtype, 1));
    const float e = p.label_smoothing;
    p.loss[r] = (1.f - e) * (lse - picked[0]) + (e != 0.f ? e * (lse - plain / float(p.V)) : 0.f);
  }
}

static void cross_entropy_bwd(const CrossEntropyParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float xs[kLossBlock], ds[kLossBlock];
  for (i64 r = row_begin; r < row_end; r++) {
    const i64 target = p.targets[r];
    const bool ignored = target == p.ignore_index;
    const float g = ignored ? 0.f : p.dloss[r], e = p.label_smoothing;
    const F scale = set(g), shift = set(p.lse[r] * kLog2e), log2e = set(kLog2e), even = set(g * e / float(p.V));
    for (i64 v0 = 0; v0 < p.V; v0 += kLossBlock) {
      const i64 n = p.V - v0 < kLossBlock ? p.V - v0 : kLossBlock;
      void* out = at(row(p.dlogits, r), p.dlogits.dtype, v0);
      float* d = write_row(out, p.dlogits.dtype, ds);
      if (ignored) {
        __builtin_memset(d, 0, size_t(n) * 4);
      } else {
        const float* x = read_row(at(row(p.logits, r), p.logits.dtype, v0), p.logits.dtype, n, xs);
        for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
          const F prob = exp2<6>(fma(load_lanes(x + c, k), log2e, zero() - shift));
          store_lanes(d + c, prob * scale - even, k);
        });
        if (target >= v0 && target < v0 + n) d[target - v0] -= g * (1.f - e);
      }
      finish_row(out, p.dlogits.dtype, d, n);
    }
  }
}
