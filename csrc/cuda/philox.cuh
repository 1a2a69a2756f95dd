// Philox4x32-10 (Salmon et al., SC 2011) and the two layouts on top of it that every backend shares (gptfast/rng.py).
//
// Dropout: element (m, i, j) belongs to the call with counter (((j >> 5) << 2) | ((j >> 1) & 3), i, m, offset), word
// (j >> 3) & 3, low half for even j; it is kept when that half is >= threshold. One call serves a thread of an mma.m16n8
// accumulator: its columns 2 q, 2 q + 1 (q = lane & 3) of four neighbouring 8-column tiles.
#pragma once
#include "compat.cuh"
#include "kernels.h"

namespace gptfast::cuda {

// The four 32-bit words of counter (c0, c1, c2, c3) under the key `seed`.
DEV_INLINE uint4 philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

DEV_INLINE uint32_t word_of(const uint4& words, int n) {
  const uint32_t low = n & 1 ? words.y : words.x, high = n & 1 ? words.w : words.z;
  return n & 2 ? high : low;
}

// What a kept element is multiplied by; 0 where everything is dropped.
DEV_INLINE float dropout_scale(const Dropout& d) {
  return d.threshold >= 65536 ? 0.f : 65536.f / float(65536 - d.threshold);
}

// The call of column j of row (m, i).
DEV_INLINE uint4 dropout_call(const Dropout& d, uint32_t m, uint32_t i, int j) {
  return philox4x32(d.seed, uint32_t(j >> 5 << 2 | (j >> 1 & 3)), i + d.first_row, m + d.first_matrix, d.offset);
}
DEV_INLINE bool dropout_keeps(const Dropout& d, uint32_t word, int half) {
  return (word >> (16 * half) & 0xffff) >= d.threshold;
}

// Which of columns j .. j + V - 1 of row (m, i) are kept. A full warp calls, and lane l has j = a multiple of 32 V plus
// l V (V = 1: any j). With V = 8, four lanes share 32 columns: each makes one of the four calls and they exchange words.
// With V = 4 eight lanes share them: lanes q and q + 4 make the same call, and each passes on two of its words.
template <int V> DEV_INLINE void dropout_keep(bool (&keep)[V], const Dropout& d, uint32_t m, uint32_t i, int j);

template <> DEV_INLINE void dropout_keep<1>(bool (&keep)[1], const Dropout& d, uint32_t m, uint32_t i, int j) {
  keep[0] = dropout_keeps(d, word_of(dropout_call(d, m, i, j), j >> 3 & 3), j & 1);
}
template <> DEV_INLINE void dropout_keep<4>(bool (&keep)[4], const Dropout& d, uint32_t m, uint32_t i, int j) {
  const int l = threadIdx.x & 7, q = l & 3, twin = l >> 2;
  const uint4 words = philox4x32(d.seed, uint32_t(j >> 5 << 2 | q), i + d.first_row, m + d.first_matrix, d.offset);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    // In turn r lane l takes its pair of columns r ^ (l >> 1 & 1), which call `from` decides.
    const int pair = r ^ (l >> 1 & 1), from = (2 * (l & 1) + pair) | (l & 4);
    const uint32_t sent = word_of(words, twin << 1 | ((q & 1) ^ r));
    const uint32_t word = __shfl_sync(0xffffffffu, sent, from, 8);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool kept = dropout_keeps(d, word, h);
      keep[h] = pair == 0 ? kept : keep[h];
      keep[2 + h] = pair == 1 ? kept : keep[2 + h];
    }
  }
}
template <> DEV_INLINE void dropout_keep<8>(bool (&keep)[8], const Dropout& d, uint32_t m, uint32_t i, int j) {
  const int l = threadIdx.x & 3;
  const uint4 words = philox4x32(d.seed, uint32_t(j >> 5 << 2 | l), i + d.first_row, m + d.first_matrix, d.offset);
  uint32_t mine[4];  // word l of the calls of lanes l, l ^ 1, l ^ 2, l ^ 3
  mine[0] = word_of(words, l);
#pragma unroll
  for (int s = 1; s < 4; s++) mine[s] = __shfl_xor_sync(0xffffffffu, word_of(words, l ^ s), s);
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const uint32_t low = (l ^ q) & 1 ? mine[1] : mine[0], high = (l ^ q) & 1 ? mine[3] : mine[2];
    const uint32_t word = (l ^ q) & 2 ? high : low;  // from lane q, at distance l ^ q
    keep[2 * q] = dropout_keeps(d, word, 0), keep[2 * q + 1] = dropout_keeps(d, word, 1);
  }
}

// Gumbel noise -log(-log1p(-v)) of one Philox word (counter (token >> 2, position, stream, kSamplingDomain), word
// token & 3), with v = min(word 2^-32 + 2^-33, 1 - 2^-24).
constexpr uint32_t kSamplingDomain = 0x73616d70;  // "samp"
DEV_INLINE float sampling_uniform(uint32_t word) {
  return fminf(fmaf(float(word), 0x1p-32f, 0x1p-33f), 1.f - 0x1p-24f);
}
DEV_INLINE float gumbel_noise(float v) { return -logf(-log1pf(-v)); }

}  // namespace gptfast::cuda
