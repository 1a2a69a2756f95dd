// One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary.
//
// The draw is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030) with noise -log(-log1p(-v)), v
// from Philox at counter (t >> 2, position, stream, "samp"), word t & 3: a function of the coordinates alone. As
// -log1p(-v) >= v, a token can beat the score s only if v <= exp(x / T - s): few get as far as the logarithms.
//
// Floor: one read of the row from memory; it then stays in L2 (201 KB at V = 50257), where top-k passes over it twice,
// top-p three times (once with exp), and a plain draw twice (with exp, and a Philox call for every four tokens).
#include "sample_candidates-inl.h"

constexpr float kMostNoise = 22.9f;  // above -log(2^-33), the noise of the least v

// The best token so far. A token can only beat it if its v <= exp(x / T - score) = exp2(x scale + limit).
struct BestCandidate {
  float score = -__builtin_inff();
  i64 token = -1;
  F limit = set(__builtin_inff());
};

struct Sampler : Candidates {
  using Candidates::Candidates;

  INL F uniform(I word) { return min(fma(to_float(word), set(0x1p-32f), set(0x1p-33f)), set(1.f - 0x1p-24f)); }
  // Offers L tokens with logits v and noise from u, where m is set; ids rise from call to call and over the lanes.
  __attribute__((always_inline)) void consider(BestCandidate& draw, F v, F u, M m, const uint32_t* ids,
                                               i64 first) const {
    if (!bits(m)) return;
    const F noise = zero() - log(zero() - log1p_negative(zero() - u));
    const F score = select(m, v / set(temperature) + noise, set(-__builtin_inff()));
    const float top = hmax(score);
    if (!(top > draw.score)) return;
    const int lane = __builtin_ctz(bits(and_mask(eq(score, set(top)), m)));
    draw.score = top;
    draw.token = ids ? i64(ids[lane]) : first + lane;
    // Rounding of both sides moves the comparison by less than this, for scores near the largest.
    const float slack = 1e-5f + 1e-6f * (magnitude(best / temperature) + magnitude(top) + kMostNoise);
    draw.limit = set((slack - top) * kLog2e);
  }
  static float magnitude(float a) { return a < 0.f ? -a : a; }

  // The draw among all tokens whose logit reaches `low`. One Philox call gives the words of four.
  APART i64 draw_all(i64 r, float low) const {
    const Wide position = widen(uint32_t(p.position[r])), stream = widen(uint32_t(p.stream[r]));
    const Wide domain = widen(0x73616d70u);
    const F scale = set(per_unit), bound = set(low), none = zero();
    BestCandidate draw;
    for (i64 c0 = 0; c0 < V; c0 += 4 * L) {
      F v[4], most_v[4], any = none;
      UNROLL_FOR (int j = 0; j < 4; j++) {
        const i64 k = V - c0 - j * L < L ? V - c0 - j * L : L;
        v[j] = k > 0 ? load_lanes(x + c0 + j * L, k) : none;
        const M m = k > 0 ? valid_lanes(ge(v[j], bound), k) : first_n(0);
        most_v[j] = select_or_zero(m, exp2<4>(fma(v[j], scale, draw.limit)));
        any = max(most_v[j], any);
      }
      if (!bits(ge(any, set(0x1p-33f)))) continue;  // the least v
      I words[4];
      const I calls = iadd(iset(uint32_t(c0 / 4)), iota());
      philox(uint32_t(options.seed), uint32_t(options.seed >> 32), widen(calls), position, stream, domain, words);
      interleave4(words);
      UNROLL_FOR (int j = 0; j < 4; j++) {
        const F u = uniform(words[j]);
        consider(draw, v[j], u, ge(most_v[j], u), nullptr, c0 + j * L);
      }
    }
    return draw.token;
  }

  // The draw among the candidates.
  APART i64 draw_kept(i64 r) const {
    const Wide position = widen(uint32_t(p.position[r])), stream = widen(uint32_t(p.stream[r]));
    const Wide domain = widen(0x73616d70u);
    const F scale = set(per_unit);
    BestCandidate draw;
    for (i64 c = 0; c < n; c += L) {
      const i64 k = n - c < L ? n - c : L;
      const F v = load_lanes(kept_x + c, k), most_v = exp2<4>(fma(v, scale, draw.limit));
      const M m = valid_lanes(ge(most_v, set(0x1p-33f)), k);
      if (!bits(m)) continue;
      const I id = iload(kept_id + c), word = iand(id, iset(3));
      I words[4];
      philox(uint32_t(options.seed), uint32_t(options.seed >> 32), widen(shr(id, 2)), position, stream, domain, words);
      const I first = iselect(ieq(word, iset(0)), words[0], words[1]);
      const I second = iselect(ieq(word, iset(2)), words[2], words[3]);
      const F u = uniform(iselect(igt(iset(2), word), first, second));
      consider(draw, v, u, and_mask(m, ge(most_v, u)), kept_id + c, 0);
    }
    return draw.token;
  }

  i64 sample_row(i64 r) {
    if (!read(r)) return -1;
    if (best == -__builtin_inff()) return -2;
    if (temperature < 0x1p-126f || !(magnitude(best / temperature) < 1e30f)) return first_best();  // noise is nothing
    const bool all = options.top_k <= 0 || options.top_k >= V;
    if (!all) top_k(options.top_k);
    if (options.top_p >= 1) return all ? draw_all(r, kLeastLogit) : draw_kept(r);
    const Nucleus nucleus = top_p(all);
    if (all && nucleus.whole && nucleus.tokens > V / 4) return draw_all(r, nucleus.last);  // a call for four is cheaper
    gather(x, nucleus.last);
    if (n > nucleus.tokens) keep_top(nucleus.last, nucleus.equals);
    return draw_kept(r);
  }
};

// out[r]: the token, -1 where the row holds nan, -2 where nothing but -inf.
static void sample(const SampleParams& p, i64 row_begin, i64 row_end) {
  Sampler s(p);
  for (i64 r = row_begin; r < row_end; r++) {
    s.use(p.each ? p.each[r] : p.all);
    p.out[r] = s.sample_row(r);
  }
}

static void fill(Kernels& k) { k.sample = sample; }
