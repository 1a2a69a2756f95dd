// The decisions of dropout along a row, for the kernels that drop.
#pragma once
#include "pointwise-inl.h"

#ifndef GPTFAST_NEON
// Philox of N vectors of calls at once, which hide each other's latency. Their counters differ in the first word alone, so that
// half of the first two rounds is the same for all; c1, c2: the next two words.
template <int N> INL void philox_calls(const Dropout& d, uint32_t c1, uint32_t c2, I first_calls, I out[N][4]) {
  constexpr uint32_t kFirst = 0xD2511F53u, kSecond = 0xCD9E8D57u, kStep0 = 0x9E3779B9u, kStep1 = 0xBB67AE85u;
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  const uint64_t b = uint64_t(kSecond) * c2, a = uint64_t(kFirst) * (uint32_t(b >> 32) ^ c1 ^ k0);
  const W of_c2 = wset(d.offset ^ k1), m0 = wset(kFirst), m1 = wset(kSecond);
  k0 += kStep0, k1 += kStep1;
  const W of_c0 = wset(uint32_t(b) ^ k0), of_c3 = wset(uint32_t(a >> 32) ^ k1), last = wset(uint32_t(a));
  W c[N][2][4];  // even and odd lanes
  UNROLL_FOR (int n = 0; n < N; n++) {
    const Wide calls = widen(iadd(first_calls, iset(uint32_t(n * L))));
    UNROLL_FOR (int h = 0; h < 2; h++) {
      const W first = wmul(m0, h ? calls.odd : calls.even), second = wmul(m1, wshr32(first) ^ of_c2);
      c[n][h][0] = wshr32(second) ^ of_c0, c[n][h][1] = second, c[n][h][2] = first ^ of_c3, c[n][h][3] = last;
    }
  }
  UNROLL_FOR (int r = 2; r < 10; r++) {
    k0 += kStep0, k1 += kStep1;
    const W K0 = wset(k0), K1 = wset(k1);
    UNROLL_FOR (int n = 0; n < N; n++)
      UNROLL_FOR (int h = 0; h < 2; h++) {
        W* x = c[n][h];
        const W first = wmul(m0, x[0]), second = wmul(m1, x[2]);
        x[0] = wxor3(wshr32(second), x[1], K0), x[2] = wxor3(wshr32(first), x[3], K1);
        x[1] = second, x[3] = first;
      }
  }
  UNROLL_FOR (int n = 0; n < N; n++)
    UNROLL_FOR (int w = 0; w < 4; w++) out[n][w] = interleave_low(c[n][0][w], c[n][1][w]);
}
#else
template <int N> INL void philox_calls(const Dropout& d, uint32_t c1, uint32_t c2, I first_calls, I out[N][4]) {
  philox(uint32_t(d.seed), uint32_t(d.seed >> 32), widen(first_calls), widen(c1), widen(c2), widen(d.offset), out[0]);
}
#endif

// Decisions of columns [j, j + n) of row (m, i), in order; j is a multiple of 32, `lanes` has room for
// round_up(n, 8 * L) values.
static void dropout_lanes(uint16_t* lanes, const Dropout& d, i64 m, i64 i, i64 j, i64 n) {
  const auto calls = [&](i64 k, auto count) __attribute__((always_inline)) {
    constexpr int N = count.value;
    I out[N][4];
    philox_calls<N>(d, uint32_t(i) + d.first_row, uint32_t(m), iadd(iset(uint32_t(j / 8 + k)), iota()), out);
    UNROLL_FOR (int u = 0; u < N; u++) {
      spread_pieces(out[u]);
      UNROLL_FOR (int w = 0; w < 4; w++) istore(lanes + 8 * (k + u * L) + 2 * L * w, out[u][w]);
    }
  };
  i64 k = 0;
  if constexpr (L == 16)  // which has the registers
    for (; 8 * (k + L) < n; k += 2 * L) calls(k, Count<2>());
  for (; 8 * k < n; k += L) calls(k, Count<1>());
}
INL float dropout_scale(const Dropout& d) { return d.threshold >= 65536 ? 0.f : 65536.f / float(65536 - d.threshold); }
// x where the element at `lanes` is kept, times `scale`; 0 elsewhere, also for nan. Reads L decisions.
INL F drop(F x, const uint16_t* lanes, uint32_t threshold, float scale) {
  return select_or_zero(uge(iload_u16(lanes), iset(threshold)), x * set(scale));
}
