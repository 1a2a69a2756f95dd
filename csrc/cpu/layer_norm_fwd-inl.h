// LayerNorm, forward; see layer_norm-inl.h.
#include "layer_norm-inl.h"
#include "norm_words-inl.h"

// total = dropout(x) + residual of rows of one dtype, and the same into `copy` if there is one.
template <DType T>
APART static void add_rows(const LayerNormParams& p, const uint16_t* lanes, const void* x, const void* residual,
                           void* total, void* copy) {
  const uint32_t threshold = p.dropout.threshold;
  const float kept = dropout_scale(p.dropout);
  for_lanes(p.C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    const F v = load_as<T>(x, c, n);
    const F sum = (threshold ? drop(v, lanes + c, threshold, kept) : v) + load_as<T>(residual, c, n);
    put_as<T>(copy, total, c, sum, n);
    if (copy) store_as<T>(copy, c, sum, n);
  });
}

// Row r of what is normalised: x, or the total, rounded as it is stored, which is what the next layer sees too.
APART static const void* norm_input(const LayerNormParams& p, const NormBuffers& t, i64 r) {
  const void* x = row(p.x, r);
  if (!p.residual.data) return x;
  const void* residual = row(p.residual, r);
  const DType type = p.total.dtype;
  void *total = row(p.total, r), *copy = p.total.non_temporal ? t.total : nullptr;
#ifdef GPTFAST_PAIRS
  if (in_words(type, p.C)) {  // of bf16 are then x and the residual too
    add_words(p, t.lanes, r, copy);
    return copy ? copy : total;
  }
#endif
  if (p.dropout.threshold) dropout_lanes(t.lanes, p.dropout, 0, r, 0, p.C);
  if (!kScalar && p.x.dtype == p.residual.dtype) {
    const auto add = [&](auto T) { add_rows<T.value>(p, t.lanes, x, residual, total, copy); };
    if constexpr (kOnlyBf16) add(DTypeConstant<DType::f32>());  // base has the others
    else with_dtype(type, add);
    return copy ? copy : total;
  }
  x = read_row(x, p.x.dtype, p.C, t.wide[0]), residual = read_row(residual, p.residual.dtype, p.C, t.wide[1]);
  if (type == DType::f32) {
    add_rows<DType::f32>(p, t.lanes, x, residual, total, copy);
    return copy ? copy : total;
  }
  add_rows<DType::f32>(p, t.lanes, x, residual, t.wide[0], nullptr);
  narrow_row(total, t.wide[0], type, p.C);
  return total;
}

// The sum over a row of its values or their squares; leaves the values in `wide` where they are not fp32.
template <DType T, bool SQUARES> APART static float first_sum(const void* x, float* wide, i64 C) {
  return row_sum(C, [=](i64 c, i64 n) __attribute__((always_inline)) {
    const F value = load_as<T>(x, c, n);
    if constexpr (T != DType::f32) store(wide + c, value);
    return SQUARES ? value * value : value;
  });
}
// In two passes over a row, of which `sum` is the first; x: its values as fp32. The first sum's roundings may exceed the spread of a
// row far from 0, so the second pass sums the differences from that mean too and corrects it. Where the mean is thousands of spreads
// away its own rounding counts: `rest` keeps it.
INL Moments moments(const float* x, float sum, i64 C) {
  const float near = sum / float(C);
  const F center = set(near);
  const TwoSums rest = row_sums(C, [=](i64 c, i64 n, F& sum, F& squares) __attribute__((always_inline)) {
    const F d = load_lanes(x + c, n) - center;
    const F counted = n == L ? d : select_or_zero(first_n(n), d);
    sum = sum + counted;
    squares = fma(counted, counted, squares);
  });
  const float left = rest.first / float(C), variance = rest.second / float(C) - left * left, mean = near + left;
  return {mean, left - (mean - near), variance < 0.f ? 0.f : variance};
}

// Row r of y, of type Y, from the values that were normalised; `size` is that of an element of x.
template <DType Y>
APART static void norm_result(const LayerNormParams& p, const NormBuffers& t, const float* values, const Moments& m,
                              float rstd, i64 r, i64 size) {
  void* y = row(p.y, r);
  const F center = set(m.mean), scale = set(rstd), rest = set(-m.rest * rstd);
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
    const void* x = norm_input(p, t, r);
    const Moments m = p.mean ? moments_of_words(x, p.C) : mean_square_of_words(x, p.C);
    const float rstd = 1.f / __builtin_sqrtf(m.variance + p.eps);
    if (p.mean) p.mean[r] = m.mean, p.mean[p.R + r] = m.rest;
    p.rstd[r] = rstd;
    if (plain && p.y.dtype == DType::bf16) result_of_words<DType::bf16, true>(p, t, x, m, rstd, r);
    else with_dtype(p.y.dtype, [&](auto y) { result_of_words<y.value, false>(p, t, x, m, rstd, r); });
  }
}
#endif

constexpr DType kWidened = kScalar ? DType::f32 : DType::bf16;
static void norm_fwd_rows(const LayerNormParams& p, i64 row_begin, i64 row_end) {
  const NormBuffers t(p);
  const DType type = p.residual.data ? p.total.dtype : p.x.dtype;
  const i64 size = element_size(p.x.dtype);
  for (i64 r = row_begin; r < row_end; r++) {
    const void* from = norm_input(p, t, r);
    const bool widens = !kScalar && type == DType::bf16;  // while it sums
    const float* x = widens ? t.wide[0] : read_row(from, type, p.C, t.wide[0]);
    float sum;
    if (p.mean)
      sum = widens ? first_sum<kWidened, false>(from, t.wide[0], p.C) : first_sum<DType::f32, false>(x, nullptr, p.C);
    else sum = widens ? first_sum<kWidened, true>(from, t.wide[0], p.C) : first_sum<DType::f32, true>(x, nullptr, p.C);
    const Moments m =
        p.mean ? moments(x, sum, p.C) : Moments{0.f, 0.f, sum / float(p.C)};  // RMSNorm: the mean counts as 0
    const float rstd = 1.f / __builtin_sqrtf(m.variance + p.eps);
    if (p.mean) p.mean[r] = m.mean, p.mean[p.R + r] = m.rest;
    p.rstd[r] = rstd;
    with_own_dtype(p.y.dtype, [&](auto y) { norm_result<y.value>(p, t, x, m, rstd, r, size); });
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
  // the rest rounds to bf16 what is normalised in fp32
  if (kOnlyBf16 && (normalised != DType::f32 || p.y.dtype != DType::bf16))
    return base.layer_norm_fwd(p, row_begin, row_end);
  norm_fwd_rows(p, row_begin, row_end);
  stream_end();
}

static void fill(Kernels& k) { k.layer_norm_fwd = layer_norm_fwd; }
