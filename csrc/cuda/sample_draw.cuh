// The draw of sample, from what sample.cuh keeps of a row.
//
// It is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030) with noise -log(-log1p(-v)):
// philox.cuh. The most likely token is never cut, so another must beat its score s. As -log1p(-v) >= v, it can only if
// v <= exp(x / T - s): few get as far as the logarithms, and where x / T is far below, not even to v.
#pragma once
#include "sample.cuh"

namespace gptfast::cuda::sampling {

struct Scored {
  float score;
  uint32_t token;
};
struct Better {
  DEV_INLINE Scored operator()(Scored a, Scored b) const {
    return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
  }
};
// A token can only reach `score` if its logit is >= least and its v <= exp2(x per_unit + limit).
struct Bounds {
  float least, limit;
  DEV_INLINE Bounds(float score, float best, float temperature, float least_kept) {
    // Rounding of both sides moves the comparisons by less than this, for scores near the largest.
    const float slack = 1e-5f + 1e-6f * (fabsf(best / temperature) + fabsf(score) + kMostNoise);
    least = fmaxf(least_kept, (score - slack - kMostNoise) * temperature);
    limit = (slack - score) * kLog2e;
  }
};
// The scores of one row's tokens. One Philox call gives the words of four.
struct Noise {
  uint64_t seed;
  uint32_t position, stream;
  float temperature;
  DEV_INLINE Noise(const SampleParams& p, const SampleOptions& o, i64 r)
      : seed(o.seed), position(uint32_t(p.position[r])), stream(uint32_t(p.stream[r])),
        temperature(float(o.temperature)) {}
  DEV_INLINE uint4 words_of(i64 t) const {
    return philox4x32(seed, uint32_t(t / 4), position, stream, kSamplingDomain);
  }
  DEV_INLINE Scored scored(float x, float v, i64 t) const { return {x / temperature + gumbel_noise(v), uint32_t(t)}; }
};
// The draw among the ranks >= lowest.
template <class T>
DEV_INLINE Scored draw(const Noise& noise, const Row<T>& row, float per_unit, u64 lowest, u64 best_rank,
                       const Shared& s) {
  const float temperature = noise.temperature, best = logit_of(best_rank), kept = logit_of(lowest);
  const i64 first = token_of(best_rank);
  Scored mine = noise.scored(best, sampling_uniform(word_of(noise.words_of(first), int(first & 3))), first);
  Bounds bounds(mine.score, best, temperature, kept);
  for_groups(row, [&](i64 t, const float (&x)[4], float top) {
    if (!__any_sync(kAllLanes, top >= bounds.least)) return;
    const uint4 words = noise.words_of(t);
    bool near[4];
#pragma unroll
    for (int k = 0; k < 4; k++)
      near[k] =
          x[k] >= bounds.least && sampling_uniform(word_of(words, k)) <= fast_exp2(fmaf(x[k], per_unit, bounds.limit));
    if (!__any_sync(kAllLanes, near[0] || near[1] || near[2] || near[3])) return;
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (near[k] && rank_of(x[k], t + k) >= lowest)
        mine = Better{}(mine, noise.scored(x[k], sampling_uniform(word_of(words, k)), t + k));
    bounds = Bounds(warp_reduce(mine.score, Max{}), best, temperature, kept);
  });
  return block_reduce(mine, Better{}, Scored{-INFINITY, 0xffffffffu}, s.scratch);
}

// Whether the options are in range. On the host nobody has looked at those in device memory.
DEV_INLINE bool valid(const SampleOptions& o) {
  return o.temperature >= 0 && o.temperature < INFINITY && o.top_k >= 0 && o.top_p > 0 && o.top_p <= 1;
}
// Whether noise is nothing beside the logits: the best one is drawn.
DEV_INLINE bool greedy(float best, float temperature) {
  return temperature < 0x1p-126f || !(fabsf(best / temperature) < 1e30f);
}
// Of log2 a unit of logits.
DEV_INLINE float units_of(float temperature) { return fminf(kLog2e / temperature, 3.4028235e38f); }

template <class T> DEV_INLINE i64 sample_row(const SampleParams& p, i64 r, bool keep, const Shared& s) {
  const SampleOptions o = p.each ? p.each[r] : p.all;
  if (!valid(o)) return -3;
  const T* x = static_cast<const T*>(p.logits.data) + r * p.logits.stride;
  T* copy = keep ? reinterpret_cast<T*>(s.row) : nullptr;
  const Seen seen = read_row(x, p.V, copy, s);
  const Row<T> row{keep ? copy : x, p.V, keep};
  if (seen.best == kNan) return -1;
  if (seen.best < kAboveMinusInf) return -2;
  const float best = logit_of(seen.best), temperature = float(o.temperature);
  if (greedy(best, temperature)) return token_of(seen.best);
  const float per_unit = units_of(temperature);
  return draw(Noise(p, o, r), row, per_unit, least_kept(row, o, per_unit, seen, s), seen.best, s).token;
}

}  // namespace gptfast::cuda::sampling
