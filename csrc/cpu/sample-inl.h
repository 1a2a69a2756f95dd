// One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary.
//
// Ranking is by logit, ties to the lowest id. Logits are compared as ordered integers, so thresholds are exact: the
// k-th largest and the last of the nucleus are found by bisection on the 32 bits of the key, over few candidates:
//   top-k   keeps the k best. Reading the row leaves the maxima of groups of kPeak values; the k-th largest of those
//           is below the k-th largest of all, and little else is above it.
//   top-p   keeps a token while the mass ranked before it is < p Z. A weight below (1 - p) Z / V cannot belong to it,
//           as all such weights together are less than (1 - p) Z.
// The draw is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030) with noise -log(-log1p(-v)), v
// from Philox at counter (t >> 2, position, stream, "samp"), word t & 3: a function of the coordinates alone. As
// -log1p(-v) >= v, a token can beat the score s only if v <= exp(x / T - s): few get as far as the logarithms.
//
// Floor: one read of the row from memory; it then stays in L2 (201 KB at V = 50257), where top-k passes over it twice,
// top-p three times (once with exp), and a plain draw twice (with exp, and a Philox call for every four tokens).

constexpr i64 kPeak = 8;              // vectors whose maxima are kept lane by lane
constexpr float kMostNoise = 22.9f;   // above -log(2^-33), the noise of the least v
constexpr float kLeastLogit = -3.4028235e38f;

// Order-preserving map of floats to unsigned integers, and back.
INL uint32_t order_key(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
INL float key_value(uint32_t k) {
  const uint32_t u = k & 0x80000000u ? k & 0x7fffffffu : ~k;
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
INL M valid_lanes(M m, i64 n) { return n == L ? m : both(m, first_n(n)); }

// How many of the values are >= (ABOVE: >) low.
template <bool ABOVE> static i64 count(const float* values, i64 n, float low) {
  i64 total = 0;
  const F bound = set(low);
  for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
    const F v = load_lanes(values + c, k);
    total += __builtin_popcount(bits(valid_lanes(ABOVE ? lt(bound, v) : ge(v, bound), k)));
  });
  return total;
}
// A bound that at least k of the values reach, and at most k + slack unless the k-th largest has equals; `most` is the
// largest value. -inf where k > n.
static float kth_bound(const float* values, i64 n, i64 k, i64 slack, float most) {
  uint32_t low = order_key(-__builtin_inff()), high = k <= n ? order_key(most) : low;
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const i64 reached = count<false>(values, n, key_value(middle));
    if (reached >= k) low = middle;
    else high = middle - 1;
    if (reached >= k && reached <= k + slack) break;
  }
  return key_value(low);
}

// The best token so far.
struct Draw {
  float score = -__builtin_inff();
  i64 token = -1;
};

struct Sampler {
  const SampleParams& p;
  const i64 V;
  const float temperature;
  const float* x = nullptr;  // the row
  float best = 0.f;          // its largest logit
  float per_unit = 0.f;      // log2(e) / T
  float *row_buffer, *weights, *peaks;
  i64 n_peaks = 0;
  float *kept_x, *kept_w;  // candidates: logits, weights exp((x - best) / T) and ids, ids rising
  uint32_t* kept_id;
  i64 n = 0;

  explicit Sampler(const SampleParams& params) : p(params), V(p.V), temperature(p.temperature) {
    const i64 room = round_up(V + L, 16), groups = round_up(V / kPeak + 2 * L, 16);
    row_buffer = static_cast<float*>(scratch(size_t(5 * room + groups) * 4));
    weights = row_buffer + room;
    kept_x = weights + room;
    kept_w = kept_x + room;
    kept_id = reinterpret_cast<uint32_t*>(kept_w + room);
    peaks = kept_w + 2 * room;
    per_unit = min_of(kLog2e / temperature, -kLeastLogit);
  }
  static float min_of(float a, float b) { return a < b ? a : b; }

  // Finds the row, its largest logit, and the peaks; false if there is a nan.
  bool read(i64 r) {
    x = read_row(row(p.logits, r), p.logits.dtype, V, row_buffer);
    const F least = set(-__builtin_inff());
    M ordered = first_n(L);
    F top = least;
    n_peaks = 0;
    for (i64 c0 = 0; c0 < V; c0 += kPeak * L) {
      F peak = least;
      for_lanes(V - c0 < kPeak * L ? V - c0 : kPeak * L, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F v = load_lanes(x + c0 + c, k);
        ordered = both(ordered, eq(v, v));
        peak = max(k == L ? v : select(first_n(k), v, least), peak);
      });
      store(peaks + n_peaks, peak);
      n_peaks += L;
      top = max(peak, top);
    }
    best = hmax(top);
    return bits(ordered) == bits(first_n(L));
  }
  i64 first_best() const {
    for (i64 c = 0; c < V; c += L) {
      const i64 k = V - c < L ? V - c : L;
      const unsigned hit = bits(valid_lanes(eq(load_lanes(x + c, k), set(best)), k));
      if (hit) return c + __builtin_ctz(hit);
    }
    return 0;
  }

  // Candidates: tokens whose `measure` (logits or weights) is >= low, in id order.
  void gather(const float* measure, float low) {
    const F bound = set(low);
    const bool weighed = measure == weights;
    n = 0;
    for_lanes(V, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F v = load_lanes(measure + c, k);
      const M m = valid_lanes(ge(v, bound), k);
      if (!bits(m)) return;
      if (weighed) compress(kept_w + n, as_int(v), m);
      compress(kept_x + n, as_int(weighed ? load_lanes(x + c, k) : v), m);
      n += compress(kept_id + n, iadd(iset(uint32_t(c)), iota()), m);
    });
  }
  // Keeps the candidates above `low` and the first `equals` of those that equal it.
  void cut(float low, i64 equals) {
    i64 out = 0;
    for (i64 c = 0; c < n; c++) {
      if (!(kept_x[c] > low) && !(kept_x[c] == low && equals-- > 0)) continue;
      kept_x[out] = kept_x[c];
      kept_id[out++] = kept_id[c];
    }
    n = out;
  }

  void top_k(i64 k) {
    const float low = kth_bound(peaks, n_peaks, k, k / 4, best);
    gather(x, low > kLeastLogit ? low : kLeastLogit);  // -inf is never drawn
    if (n <= k) return;
    const float last = kth_bound(kept_x, n, k, 0, best);
    cut(last, k - count<true>(kept_x, n, last));
  }

  // out[c] = exp((values[c] - best) / T); returns the sum.
  double weigh(const float* values, float* out, i64 count) const {
    const F center = set(best), scale = set(per_unit);
    double total = 0;
    for (i64 c0 = 0; c0 < count; c0 += 2048)
      total += double(row_sum(count - c0 < 2048 ? count - c0 : 2048, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F w = exp2<6>((load_lanes(values + c0 + c, k) - center) * scale);
        const F counted = k == L ? w : keep(first_n(k), w);
        store_lanes(out + c0 + c, counted, k);
        return counted;
      }));
    return total;
  }
  // The sum of the weights w[0..count) whose logit is > bound.
  static double mass_above(const float* logits, const float* w, i64 count, float bound) {
    double total = 0;
    for (i64 c0 = 0; c0 < count; c0 += 2048)
      total += double(row_sum(count - c0 < 2048 ? count - c0 : 2048, [&](i64 c, i64 k) __attribute__((always_inline)) {
        return keep(lt(set(bound), load_lanes(logits + c0 + c, k)), load_lanes(w + c0 + c, k));
      }));
    return total;
  }
  // Moves those of (logits, w) together that are > bound (or those that are not), in order; returns how many.
  static i64 partition(float* logits, float* w, i64 count, float bound, bool above) {
    i64 left = 0;
    for (i64 c = 0; c < count; c += L) {
      const i64 k = count - c < L ? count - c : L;
      const F v = load_lanes(logits + c, k), u = load_lanes(w + c, k);
      const M m = valid_lanes(above ? lt(set(bound), v) : ge(set(bound), v), k);
      compress(logits + left, as_int(v), m);
      left += compress(w + left, as_int(u), m);
    }
    return left;
  }

  void top_p(bool all) {
    const double total = all ? weigh(x, weights, V) : weigh(kept_x, kept_w, n), goal = p.top_p * total;
    const double least = 0.999 * (1 - p.top_p) * total / double(V);
    if (all) gather(weights, least > 1e-30 ? float(least) : 1e-30f);
    // The smallest key with mass(keys > it) < goal lies in [low, high]; undecided candidates are those inside.
    uint32_t low = order_key(-__builtin_inff()), high = order_key(best);
    float *open_x = row_buffer, *open_w = weights;  // the row itself is not needed any more
    __builtin_memcpy(open_x, kept_x, size_t(n) * 4);
    __builtin_memcpy(open_w, kept_w, size_t(n) * 4);
    i64 open = n;
    double settled = 0;  // mass of the keys > high
    while (low < high && open > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const double above = settled + mass_above(open_x, open_w, open, key_value(middle));
      const bool enough = above >= goal;
      if (enough) low = middle + 1;
      else high = middle, settled = above;
      open = partition(open_x, open_w, open, key_value(middle), enough);
    }
    const float last = open == 1 ? open_x[0] : key_value(low);
    const float weight = open ? open_w[0] : 0.f;
    i64 equals = 0;
    for (double before = settled; before < goal && equals < n; before += double(weight)) equals++;
    cut(last, equals);
  }

  INL F uniform(I word) {
    return min(fma(to_float(word), set(0x1p-32f), set(0x1p-33f)), set(1.f - 0x1p-24f));
  }
  // Scores of L tokens with logits v, where m is set; ids rise from call to call and over the lanes.
  INL void offer(Draw& draw, F v, F u, M m, F T, const uint32_t* ids, i64 first) {
    const F noise = zero() - log(zero() - log1p_negative(zero() - u));
    const F score = select(m, v / T + noise, set(-__builtin_inff()));
    const float top = hmax(score);
    if (!(top > draw.score)) return;
    const int lane = __builtin_ctz(bits(both(eq(score, set(top)), m)));
    draw.score = top;
    draw.token = ids ? i64(ids[lane]) : first + lane;
  }

  // The draw among all tokens. One Philox call gives the words of four.
  i64 draw_all(i64 r) const {
    const Wide position = widen(uint32_t(p.position[r])), stream = widen(uint32_t(p.stream[r]));
    const Wide domain = widen(0x73616d70u);
    const F T = set(temperature), scale = set(per_unit);
    const float warm = best / temperature;
    Draw draw;
    F limit = set(__builtin_inff());  // log2 of the v that still wins is x / T log2(e) + limit
    for (i64 c0 = 0; c0 < V; c0 += 4 * L) {
      I words[4];
      const I calls = iadd(iset(uint32_t(c0 / 4)), iota());
      philox(uint32_t(p.seed), uint32_t(p.seed >> 32), widen(calls), position, stream, domain, words);
      interleave4(words);
      UNROLL for (int j = 0; j < 4; j++) {
        const i64 c = c0 + j * L, k = V - c < L ? V - c : L;
        if (k <= 0) break;
        const F v = load_lanes(x + c, k), u = uniform(words[j]);
        const M m = valid_lanes(ge(exp2<4>(fma(v, scale, limit)), u), k);
        if (!bits(m)) continue;
        offer(draw, v, u, m, T, nullptr, c);
        // Rounding of both sides moves the comparison by less than this, for scores near the largest.
        const float slack = 1e-5f + 1e-6f * (magnitude(warm) + magnitude(draw.score) + kMostNoise);
        limit = set((slack - draw.score) * kLog2e);
      }
    }
    return draw.token;
  }
  static float magnitude(float a) { return a < 0.f ? -a : a; }

  // The draw among the candidates.
  i64 draw_kept(i64 r) const {
    const Wide position = widen(uint32_t(p.position[r])), stream = widen(uint32_t(p.stream[r]));
    const Wide domain = widen(0x73616d70u);
    const F T = set(temperature);
    Draw draw;
    for (i64 c = 0; c < n; c += L) {
      const i64 k = n - c < L ? n - c : L;
      const F v = load_lanes(kept_x + c, k);
      const M m = valid_lanes(ge(v / T + set(kMostNoise), set(draw.score)), k);
      if (!bits(m)) continue;
      const I id = iload(kept_id + c), word = iand(id, iset(3));
      I words[4];
      philox(uint32_t(p.seed), uint32_t(p.seed >> 32), widen(shr(id, 2)), position, stream, domain, words);
      const I low = iselect(ieq(word, iset(0)), words[0], words[1]);
      const I high = iselect(ieq(word, iset(2)), words[2], words[3]);
      offer(draw, v, uniform(iselect(igt(iset(2), word), low, high)), m, T, kept_id + c, 0);
    }
    return draw.token;
  }

  i64 one(i64 r) {
    if (!read(r)) return -1;
    if (best == -__builtin_inff()) return -2;
    if (temperature < 0x1p-126f || !(magnitude(best / temperature) < 1e30f)) return first_best();  // noise is nothing
    const bool all = p.top_k <= 0 || p.top_k >= V;
    if (!all) top_k(p.top_k);
    if (p.top_p < 1) top_p(all);
    return all && p.top_p >= 1 ? draw_all(r) : draw_kept(r);
  }
};

// out[r]: the token, -1 where the row holds nan, -2 where nothing but -inf.
static void sample(const SampleParams& p, i64 row_begin, i64 row_end) {
  Sampler s(p);
  for (i64 r = row_begin; r < row_end; r++) p.out[r] = s.one(r);
}
