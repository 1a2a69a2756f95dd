// Norms of rows of bf16 in whole vectors of words, where there are products of pairs: a load is two vectors of values, no copy
// of the row in fp32 is written, and stores are of whole vectors. A word holds columns 2 i and 2 i + 1, so weight and bias lie
// that way too (split_columns).
#pragma once
#include "layer_norm-inl.h"
#include "words-inl.h"

struct Moments {
  float mean, rest, variance;  // the mean is mean + rest
};

#ifdef GPTFAST_PAIRS
// To a row of any dtype, from column c on.
INL void put_split(bool past, void* p, DType type, i64 c, Split v) {
  if (type == DType::bf16) return put_words(past, at(p, type, c), v);
  interleave(v.even, v.odd);
  put_any(past, p, type, c, v.even, L), put_any(past, p, type, c + L, v.odd, L);
}
// The words with 0 in the halves of columns that are dropped; threshold > 0.
INL I kept_words(I words, const uint16_t* lanes, uint32_t threshold) {
#ifdef GPTFAST_NEON
  const uint16x8_t least = vdupq_n_u16(uint16_t(threshold - 1)), decisions = vreinterpretq_u16_u32(iload(lanes));
  return iand(words, vreinterpretq_u32_u16(vcgtq_u16(decisions, least)));
#else
  return _mm512_maskz_mov_epi16(_mm512_cmpgt_epu16_mask(iload(lanes), _mm512_set1_epi16(short(threshold - 1))), words);
#endif
}
// put_split of what is left of v after dropout, times `scale`.
INL void put_kept(bool past, void* p, DType type, i64 c, Split v, const uint16_t* lanes, uint32_t threshold,
                  float scale) {
  v = {v.even * set(scale), v.odd * set(scale)};
  if (type == DType::bf16) return put(past, at(p, type, c), kept_words(pair_bf16(v.even, v.odd), lanes, threshold));
  const I decisions = iload(lanes), least = iset(threshold);
  put_split(past, p, type, c,
            {select_or_zero(uge(iand(decisions, iset(0xffffu)), least), v.even),
             select_or_zero(uge(shr16(decisions), least), v.odd)});
}
constexpr i64 kDecided = 16 * L;  // columns whose dropout is decided at a time, so that memory has work to do meanwhile
INL bool in_words(DType type, i64 C) { return type == DType::bf16 && C % (2 * L) == 0; }
// f(c, values, n) for the words from column c on, n = 0 to N - 1 in turn.
template <int N, class Fn> INL void for_words(const void* x, i64 C, Fn f) {
  const uint16_t* values = static_cast<const uint16_t*>(x);
  i64 c = 0;
  for (; c + 2 * N * L <= C; c += 2 * N * L)
    UNROLL_FOR (int n = 0; n < N; n++) f(c + 2 * n * L, split(iload(values + c + 2 * n * L)), n);
  for (; c < C; c += 2 * L) f(c, split(iload(values + c)), 0);
}

// total = dropout(x) + residual, and the same into `copy` if there is one.
INL void add_words(const LayerNormParams& p, uint16_t* lanes, i64 r, void* copy) {
  const uint32_t threshold = p.dropout.threshold;
  const float kept = dropout_scale(p.dropout);
  const void *x = row(p.x, r), *residual = row(p.residual, r);
  void* total = row(p.total, r);
  for (i64 c = 0; c < p.C; c += 2 * L) {
    if (threshold && c % kDecided == 0)
      dropout_lanes(lanes, p.dropout, 0, r, c, p.C - c < kDecided ? p.C - c : kDecided);
    const I words = iload(at(x, DType::bf16, c));
    const Split own = split(threshold ? kept_words(words, lanes + c % kDecided, threshold) : words);
    const Split rest = load_words(residual, c);
    const Split sum = {fma(own.even, set(kept), rest.even), fma(own.odd, set(kept), rest.odd)};
    put_words(copy, at(total, DType::bf16, c), sum);
    if (copy) put_words(false, at(copy, DType::bf16, c), sum);
  }
}

// In two passes, as `moments` of layer_norm_fwd-inl.h, which corrects what the products by 1 round.
INL Moments moments_of_words(const void* x, i64 C) {
  const uint16_t* words = static_cast<const uint16_t*>(x);
  static const volatile uint32_t two_ones =
      0x3f803f80u;  // a constant becomes an instruction that AArch64's assembler refuses
  const I ones = iset(two_ones);
  F s[4] = {zero(), zero(), zero(), zero()}, a[2][2], b[2][2];
  i64 c = 0;
  for (; c + 8 * L <= C; c += 8 * L)
    UNROLL_FOR (int n = 0; n < 4; n++) s[n] = multiply_pairs(s[n], iload(words + c + 2 * n * L), ones);
  for (; c < C; c += 2 * L) s[0] = multiply_pairs(s[0], iload(words + c), ones);
  const float near = sum((s[0] + s[1]) + (s[2] + s[3])) / float(C);
  const F center = set(near);
  UNROLL_FOR (int n = 0; n < 2; n++) a[n][0] = a[n][1] = b[n][0] = b[n][1] = zero();
  for_words<2>(x, C, [&](i64, Split v, int n) __attribute__((always_inline)) {
    const F even = v.even - center, odd = v.odd - center;
    a[n][0] = a[n][0] + even, a[n][1] = a[n][1] + odd;
    b[n][0] = fma(even, even, b[n][0]), b[n][1] = fma(odd, odd, b[n][1]);
  });
  const float left = sum((a[0][0] + a[0][1]) + (a[1][0] + a[1][1])) / float(C);
  const float squares = sum((b[0][0] + b[0][1]) + (b[1][0] + b[1][1])) / float(C), mean = near + left;
  const float variance = squares - left * left;
  return {mean, left - (mean - near), variance < 0.f ? 0.f : variance};
}
INL Moments mean_square_of_words(const void* x, i64 C) {
  F s[2][2] = {{zero(), zero()}, {zero(), zero()}};
  for_words<2>(x, C, [&](i64, Split v, int n) __attribute__((always_inline)) {
    s[n][0] = fma(v.even, v.even, s[n][0]), s[n][1] = fma(v.odd, v.odd, s[n][1]);
  });
  return {0.f, 0.f, sum((s[0][0] + s[0][1]) + (s[1][0] + s[1][1])) / float(C)};
}

// Row r of y, of type Y. PLAIN: neither mean nor bias.
template <DType Y, bool PLAIN>
static void result_of_words(const LayerNormParams& p, const NormBuffers& t, const void* x, const Moments& m, float rstd,
                            i64 r) {
  const F center = set(m.mean), scale = set(rstd), rest = set(-m.rest * rstd);
  void* y = row(p.y, r);
  const float *weight = t.weight, *bias = t.bias;
  const bool past = p.y.non_temporal;
  const char *next_x = next_row(p, p.x, r), *next_residual = next_row(p, p.residual, r);
  const auto value = [=](F x, i64 c) __attribute__((always_inline)) {
    if (PLAIN) return x * scale * load(weight + c);
    return fma(fma(x - center, scale, rest), load(weight + c), load(bias + c));
  };
  for_words<1>(x, p.C, [=](i64 c, Split v, int) __attribute__((always_inline)) {
    prefetch(next_x + 2 * c);
    if (next_residual) prefetch(next_residual + 2 * c);
    const Split result = {value(v.even, c), value(v.odd, c + L)};
    put_split(past, y, Y, c, result);
  });
}
#endif
