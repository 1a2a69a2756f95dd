// LayerNorm, forward; see layer_norm-inl.h.
#include "layer_norm-inl.h"
#include "norm_words-inl.h"

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
template <DType T> APART static const void* norm_input(const LayerNormParams& p, const NormBuffers& t, i64 r) {
  const void* x = row(p.x, r);
  if (!p.residual.data) return x;
  const void* residual = row(p.residual, r);
  void *total = row(p.total, r), *copy = p.total.non_temporal ? t.total : nullptr;
#ifdef GPTFAST_PAIRS
  if (in_words(T, p.C)) {  // of bf16 are then x and the residual too
    add_words(p, t.lanes, r, copy);
    return copy ? copy : total;
  }
#endif
  if (p.dropout.threshold) dropout_lanes(t.lanes, p.dropout, 0, r, 0, p.C);
  const DType x_type = p.x.dtype, residual_type = p.residual.dtype;
  if (!kScalar && x_type == T && residual_type == T)
    add_rows<T>(
        p, t.lanes, total, copy, [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(x, c, n); },
        [=](i64 c, i64 n) __attribute__((always_inline)) { return load_as<T>(residual, c, n); });
  else
    add_rows<T>(
        p, t.lanes, total, copy,
        [=](i64 c, i64 n) __attribute__((always_inline)) { return load_any(at(x, x_type, c), x_type, n); },
        [=](i64 c, i64 n)
            __attribute__((always_inline)) { return load_any(at(residual, residual_type, c), residual_type, n); });
  return copy ? copy : total;
}

// In two passes over the row, which it leaves in `wide` where T is not fp32. The first sum's roundings may exceed the spread
// of a row far from 0, so the second pass sums the differences from that mean too and corrects it. Where the mean is
// thousands of spreads away its own rounding counts: `rest` keeps it.
template <DType T> INL Moments moments(const void* x, float* wide, i64 C) {
  const float sum = row_sum(C, [&](i64 c, i64 n) __attribute__((always_inline)) {
    const F value = load_as<T>(x, c, n);
    if constexpr (T != DType::f32) store(wide + c, value);
    return value;
  });
  const float near = sum / float(C);
  const float* values = T == DType::f32 ? static_cast<const float*>(x) : wide;
  const F center = set(near);
  const TwoSums rest = row_sums(C, [&](i64 c, i64 n, F& sum, F& squares) __attribute__((always_inline)) {
    const F d = load_lanes(values + c, n) - center;
    const F counted = n == L ? d : select_or_zero(first_n(n), d);
    sum = sum + counted;
    squares = fma(counted, counted, squares);
  });
  const float left = rest.first / float(C), variance = rest.second / float(C) - left * left, mean = near + left;
  return {mean, left - (mean - near), variance < 0.f ? 0.f : variance};
}

// The same where the mean counts as 0: variance is the mean of the squares.
template <DType T> INL Moments mean_square(const void* x, float* wide, i64 C) {
  const float sum = row_sum(C, [&](i64 c, i64 n) __attribute__((always_inline)) {
    const F value = load_as<T>(x, c, n);
    if constexpr (T != DType::f32) store(wide + c, value);
    return value * value;
  });
  return {0.f, 0.f, sum / float(C)};
}

// Row r of y, of type Y, from the values that were normalised; `size` is that of an element of x.
template <DType Y>
APART static void norm_result(const LayerNormParams& p, const NormBuffers& t, const float* values, const Moments& m,
                              float rstd, i64 r, i64 size) {
  const F center = set(m.mean), scale = set(rstd), rest = set(-m.rest * rstd);
  void* y = row(p.y, r);
  const float *weight = t.weight, *bias = t.bias;
  const bool past = p.y.non_temporal;
  const char *next_x = next_row(p, p.x, r), *next_residual = next_row(p, p.residual, r);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    prefetch(next_x + c * size);
    if (next_residual) prefetch(next_residual + c * size);
    const F xhat = fma(load_lanes(values + c, n) - center, scale, rest);
    put_as<Y>(past, y, c, fma(xhat, load_lanes(weight + c, n), load_lanes(bias + c, n)), n);
  });
}

#ifdef GPTFAST_PAIRS
static void norm_fwd_words(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p);
  split_columns(t.weight, p.C), split_columns(t.bias, p.C);
  const bool plain = !p.mean && !p.bias.data;
  for (i64 r = row_begin; r < row_end; r++) {
    const void* x = norm_input<DType::bf16>(p, t, r);
    const Moments m = p.mean ? moments_of_words(x, p.C) : mean_square_of_words(x, p.C);
    const float rstd = 1.f / __builtin_sqrtf(m.variance + p.eps);
    if (p.mean) p.mean[r] = m.mean, p.mean[p.R + r] = m.rest;
    p.rstd[r] = rstd;
    if (plain && p.y.dtype == DType::bf16) result_of_words<DType::bf16, true>(p, t, x, m, rstd, r);
    else with_dtype(p.y.dtype, [&](auto y) { result_of_words<y.value, false>(p, t, x, m, rstd, r); });
  }
}
#endif

template <DType T> APART static void norm_fwd_rows(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p);
  for (i64 r = row_begin; r < row_end; r++) {
    const void* x = norm_input<T>(p, t, r);
    constexpr DType kRead = T == DType::f16 ? DType::f32 : T;
    if constexpr (T == DType::f16) x = read_row(x, T, p.C, t.wide);
    const Moments m = p.mean ? moments<kRead>(x, t.wide, p.C) : mean_square<kRead>(x, t.wide, p.C);
    const float rstd = 1.f / __builtin_sqrtf(m.variance + p.eps);
    if (p.mean) p.mean[r] = m.mean, p.mean[p.R + r] = m.rest;
    p.rstd[r] = rstd;
    const float* values = kRead == DType::f32 ? static_cast<const float*>(x) : t.wide;
    with_own_dtype(p.y.dtype, [&](auto y) { norm_result<y.value>(p, t, values, m, rstd, r, element_size(T)); });
  }
}
static void layer_norm_fwd(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const DType normalised = p.residual.data ? p.total.dtype : p.x.dtype;
#ifdef GPTFAST_PAIRS
  if (in_words(normalised, p.C)) {
    norm_fwd_words(p, row_begin, row_end);
    return stream_end();
  }
#endif
  if constexpr (kOnlyBf16) {  // the rest rounds to bf16 what is normalised in fp32
    if (normalised != DType::f32 || p.y.dtype != DType::bf16) return base.layer_norm_fwd(p, row_begin, row_end);
    norm_fwd_rows<DType::f32>(p, row_begin, row_end);
  } else {
    with_dtype(normalised, [&](auto t) { norm_fwd_rows<t.value>(p, row_begin, row_end); });
  }
  stream_end();
}

static void fill(Kernels& k) { k.layer_norm_fwd = layer_norm_fwd; }
