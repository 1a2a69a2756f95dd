// The softmax of attention over fragments of scores, with a running maximum and sum of each row, and the decisions of
// dropout in fragment order.
#pragma once
#include <cfloat>

#include "causal_attention.h"
#include "causal_attention_tile.cuh"
#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {

// ---- softmax --------------------------------------------------------------------------------------------------------
// exp2(scale s - scale m) is one fused multiply-add and one exp2. Its product scale * m is rounded: for scores of 4e3 that is
// seen in the weights, and from 4e9 on they overflow. So where the product is beyond kFar, the maximum is taken off the
// scores first. Rows seldom are, and a block without such a row pays one comparison for each.

constexpr float kFar = 64.f;  // units of log2

// With a soft cap the scores of the kernels are tanh(inner q k^T), in units of the cap: what scale is to others, the cap is
// to them.
DEV_INLINE float score_scale_of(const AttentionParams& p) { return p.softcap > 0.f ? p.softcap : p.scale; }
DEV_INLINE float scale_log2_of(const AttentionParams& p) {  // above 0, as 0 times the -inf of masked scores is nan
  return fmaxf(score_scale_of(p), 1e-30f) * kLog2e;
}
DEV_INLINE float capped(const AttentionParams& p, float product) { return tanhf(p.scale / p.softcap * product); }

// A query whose scores have maximum m, and weights relative to it that sum up to `sum`; its sink joins them. Stores what
// backward needs, and gives what the weighted sum of its values is to be multiplied by: 0 where it saw no key.
DEV_INLINE float finish_query(const AttentionParams& p, int bh, int i, float m, float sum, float kept, bool stores) {
  const float top = m * scale_log2_of(p);
  bool far = fabsf(top) > kFar;
  float level = sum == 0.f ? -INFINITY : far ? log2f(sum) : top + log2f(sum);
  float factor = sum == 0.f ? 0.f : kept / sum;
  if (p.sinks) {  // weights are then relative to the larger one of maximum and sink, which is `lift` above the maximum
    const bool blind = sum == 0.f;
    const float base = blind ? 0.f : top, beyond = p.sinks[bh % p.H] * kLog2e - base;
    const float lift = fmaxf(beyond, blind ? -FLT_MAX : 0.f), fade = blind ? 0.f : fast_exp2(-lift);
    sum = sum * fade + fast_exp2(beyond - lift);
    far = far && !blind;
    level = sum == 0.f ? -INFINITY : (far ? 0.f : base) + lift + log2f(sum);
    factor = sum == 0.f ? 0.f : kept * fade / sum;
  }
  if (stores) {
    p.shift[i64(bh) * p.T + i] = sum != 0.f && far ? m : 0.f;
    p.level[i64(bh) * p.T + i] = level;
  }
  return factor;
}

// Scores -> weights, and the running maximum m and sum l of the lane's rows brought up to date, the sum over its own columns
// only. What was summed before must be multiplied by `rescale`.
template <int MT, int NT>
DEV_INLINE void softmax(float (&s)[MT][NT][4], float (&m)[MT][2], float (&l)[MT][2], float (&rescale)[MT][2],
                        float scale_log2) {
  auto seen = [](float top) { return top == -INFINITY ? 0.f : top; };  // 0 for a row that has seen no key yet
  float shift[MT][2];
  bool far = false;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < NT; n++) top = fmaxf(top, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(m[i][h], fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)));
      rescale[i][h] = fast_exp2((m[i][h] - seen(top)) * scale_log2);
      m[i][h] = top;
      shift[i][h] = seen(top) * scale_log2;
      far |= fabsf(shift[i][h]) > kFar;
    }
  if (far) {
    each_element<MT, NT>([&](int i, int n, int e) { s[i][n][e] -= seen(m[i][e / 2]); });
#pragma unroll
    for (int n = 0; n < 2 * MT; n++) shift[n / 2][n % 2] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          s[i][n][e] = fast_exp2(fmaf(s[i][n][e], scale_log2, -shift[i][h]));
          sum += s[i][n][e];
        }
      l[i][h] = l[i][h] * rescale[i][h] + sum;
    }
}
// Leaves the statistics, and gives what the lane's rows of output must be multiplied by: 0 for a row that saw no key.
template <int MT>
DEV_INLINE void finish_softmax(const float (&m)[MT][2], const float (&l)[MT][2], float (&factor)[MT][2],
                               const AttentionParams& p, float kept, int bh, int row) {
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) {
    float sum = l[n / 2][n % 2];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int i = row + 8 * n;
    factor[n / 2][n % 2] = finish_query(p, bh, i, m[n / 2][n % 2], sum, kept, threadIdx.x % 4 == 0 && i < p.T);
  }
}
// Is any of the shifts of a tile's N columns not 0?
template <int N> DEV_INLINE bool any_far(const float* shift) {
  bool far = false;
#pragma unroll
  for (int n = threadIdx.x % 32; n < N; n += 32) far |= shift[n] != 0.f;
  return __any_sync(kAllLanes, far);
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// f(m, n, e, keep) for every element result[m][n][e] of a lane whose first row is `row` of `matrix`; columns from j0
// on, a multiple of 8 NT.
template <int MT, int NT, class F>
DEV_INLINE void each_decision(const Dropout& dropout, int matrix, int row, int j0, F f) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < NT; n += 4) {  // the four words of a call serve four tiles of 8 columns
        const int j = j0 + n * 8 + int(threadIdx.x % 4) * 2;
        const uint4 words = dropout_call(dropout, matrix, row + 16 * m + 8 * h, j);
#pragma unroll
        for (int k = 0; k < 4 && n + k < NT; k++) {
          const uint32_t word = word_of(words, NT % 4 ? (j / 8 + k) % 4 : k);
#pragma unroll
          for (int e = 0; e < 2; e++) f(m, n + k, 2 * h + e, dropout_keeps(dropout, word, e));
        }
      }
}
// The same for transposed results: rows are keys from `key` on, a multiple of 16 MT, and columns queries from i0 on. A
// call then serves both lanes of a pair, g and g ^ 1: each makes that of one of their two queries and passes on the
// half of its words that belongs to the other's keys.
template <int MT, int NT, class F>
DEV_INLINE void each_decision_transposed(const Dropout& dropout, int matrix, int key, int i0, F f) {
  const int g = threadIdx.x % 32 / 4, odd = g % 2;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 words = dropout_call(dropout, matrix, i0 + n * 8 + int(threadIdx.x % 4) * 2 + odd, key + g);
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int first = MT == 1 ? key / 8 % 4 : 2 * m;
      const uint32_t a = word_of(words, first), b = word_of(words, first + 1);
      const uint32_t low = (a & 0xffff) | b << 16, high = a >> 16 | (b & 0xffff0000);
      const uint32_t own = odd ? high : low, other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
#pragma unroll
      for (int e = 0; e < 4; e++) f(m, n, e, dropout_keeps(dropout, e % 2 == odd ? own : other, e / 2));
    }
  }
}

}  // namespace gptfast::cuda
