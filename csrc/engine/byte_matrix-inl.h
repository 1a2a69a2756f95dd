// The tile of byte_tile-inl.h for R rows on I8MM's matrix product: usmmla multiplies two outputs of 8 unsigned bytes along k by 8
// signed bytes of two rows. Integer sums, so the results are those of byte_tile to the bit.
#pragma once

// Bytes k to k + 7 of rows m and next of x.
INL int8x16_t eight_of_rows(const Activations& x, i64 m, i64 next, i64 k) {
  return vcombine_s8(vld1_s8(x.q + m * x.stride + k), vld1_s8(x.q + next * x.stride + k));
}

template <class U, int R, int V, class N>
static void byte_matrix(const uint8_t* levels, const char* w, N n, const Activations& x, i64 m, i64 K, float* y,
                        i64 ldy) {
  const U quads(levels);
  constexpr int P = (R + 1) / 2;
  const i64 groups = x.stride / kGroup;
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 g = 0; g * kGroup < K; g++, w += U::kBytes) {
    int32x4_t sum[P][2][V];  // outputs n and n + 1 (then n + 2 and n + 3), each of rows 2 p and 2 p + 1
    i64 next[P];
    UNROLL_FOR (int p = 0; p < P; p++) {
      next[p] = m + (2 * p + 1 < R ? 2 * p + 1 : 2 * p);
      const int32_t first = x.acc_init[(m + 2 * p) * groups + g], second = x.acc_init[next[p] * groups + g];
      UNROLL_FOR (int v = 0; v < V; v++) sum[p][0][v] = sum[p][1][v] = int32x4_t{first, second, first, second};
    }
    UNROLL_FOR (int q = 0; q < 8; q += 2) {
      int8x16_t a[P];
      UNROLL_FOR (int p = 0; p < P; p++) a[p] = eight_of_rows(x, m + 2 * p, next[p], g * kGroup + 4 * q);
      UNROLL_FOR (int v = 0; v < V; v++) {
        const I b0 = quads.quad(w + U::kScales, n + v * L, q), b1 = quads.quad(w + U::kScales, n + v * L, q + 1);
        const uint8x16_t low = vreinterpretq_u8_u32(vzip1q_u32(b0, b1)),
                         high = vreinterpretq_u8_u32(vzip2q_u32(b0, b1));
        UNROLL_FOR (int p = 0; p < P; p++) {
          sum[p][0][v] = vusmmlaq_s32(sum[p][0][v], low, a[p]);
          sum[p][1][v] = vusmmlaq_s32(sum[p][1][v], high, a[p]);
        }
      }
    }
    UNROLL_FOR (int v = 0; v < V; v++) {
      const F scale = U::scales(w, n + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const int32x4_t low = sum[r / 2][0][v], high = sum[r / 2][1][v];
        const F total = vcvtq_f32_s32(r % 2 ? vuzp2q_s32(low, high) : vuzp1q_s32(low, high));
        acc[r][v] = fma(total, scale * set(x.scale[(m + r) * groups + g]), acc[r][v]);
      }
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store(y + r * ldy + n + v * L, acc[r][v]);
}
