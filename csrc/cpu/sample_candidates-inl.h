// The tokens of a row that top-k and top-p leave; see sample-inl.h.
//
// Ranking is by logit, ties to the lowest id. Logits are compared as ordered integers, so thresholds are exact: the
// k-th largest and the last of the nucleus are found by bisection on the 32 bits of the key, over few candidates:
//   top-k   keeps the k best. Reading the row leaves the maxima of groups of kPeak values; the k-th largest of those
//           is below the k-th largest of all, and little else is above it.
//   top-p   keeps a token while the mass ranked before it is < p Z. A weight below (1 - p) Z / V cannot belong to it,
//           as all such weights together are less than (1 - p) Z.

constexpr i64 kPeak = 8;  // vectors whose maxima are kept lane by lane
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
INL M valid_lanes(M m, i64 n) { return n == L ? m : and_mask(m, first_n(n)); }

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

// A row of logits, and candidates among its tokens.
struct Candidates {
  const SampleParams& p;
  const i64 V;
  SampleOptions options{};  // of the row
  float temperature = 0.f;
  const float* x = nullptr;  // the row
  float best = 0.f;          // its largest logit
  float per_unit = 0.f;      // log2(e) / T
  float *row_buffer, *weights, *peaks;
  i64 n_peaks = 0;
  float *kept_x, *kept_w;  // candidates: logits, weights exp((x - best) / T) and ids, ids rising
  uint32_t* kept_id;
  i64 n = 0;

  explicit Candidates(const SampleParams& params) : p(params), V(p.V) {
    const i64 room = round_up(V + L, 16), groups = round_up(V / kPeak + 2 * L, 16);
    row_buffer = static_cast<float*>(scratch(size_t(5 * room + groups) * 4));
    weights = row_buffer + room;
    kept_x = weights + room;
    kept_w = kept_x + room;
    kept_id = reinterpret_cast<uint32_t*>(kept_w + room);
    peaks = kept_w + 2 * room;
  }
  void use(const SampleOptions& of_row) {
    options = of_row;
    temperature = float(options.temperature);
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
        ordered = and_mask(ordered, eq(v, v));
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
  void keep_top(float low, i64 equals) {
    i64 out = 0;
    const F bound = set(low);
    for_lanes(n, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F v = load_lanes(kept_x + c, k);
      const M reach = valid_lanes(ge(v, bound), k);
      if (!bits(reach)) return;
      const I id = iload(kept_id + c);
      i64 count = compress(kept_id + out, id, reach);
      compress(kept_x + out, as_int(v), reach);
      const i64 same = __builtin_popcount(bits(and_mask(reach, eq(v, bound))));
      if (same > equals) count = drop_equals(out, count, low, equals);
      equals = same > equals ? 0 : equals - same;
      out += count;
    });
    n = out;
  }
  // Of the `count` candidates from `first` on, all >= low, keeps those above and the first `equals` others.
  i64 drop_equals(i64 first, i64 count, float low, i64 equals) {
    i64 out = first;
    for (i64 c = first; c < first + count; c++) {
      if (kept_x[c] == low && equals-- <= 0) continue;
      kept_x[out] = kept_x[c];
      kept_id[out++] = kept_id[c];
    }
    return out - first;
  }

  void top_k(i64 k) {
    const float low = kth_bound(peaks, n_peaks, k, k / 4, best);
    gather(x, low > kLeastLogit ? low : kLeastLogit);  // -inf is never drawn
    if (n <= k) return;
    const float last = kth_bound(kept_x, n, k, 0, best);
    keep_top(last, k - count<true>(kept_x, n, last));
  }

  // out[c] = exp((values[c] - best) / T); returns the sum.
  double exp_scores(const float* values, float* out, i64 count) const {
    const F center = set(best), scale = set(per_unit);
    double total = 0;
    for (i64 c0 = 0; c0 < count; c0 += 2048)
      total += double(row_sum(count - c0 < 2048 ? count - c0 : 2048, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F w = exp2<6>((load_lanes(values + c0 + c, k) - center) * scale);
        const F counted = k == L ? w : select_or_zero(first_n(k), w);
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
        return select_or_zero(lt(set(bound), load_lanes(logits + c0 + c, k)), load_lanes(w + c0 + c, k));
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

  // The nucleus: tokens above `last` and the first `equals` of those that equal it.
  struct Nucleus {
    float last;
    i64 equals, tokens;
    bool whole;  // no further candidate equals last
  };
  Nucleus top_p(bool all) {
    const double total = all ? exp_scores(x, weights, V) : exp_scores(kept_x, kept_w, n), goal = options.top_p * total;
    const double least = 0.999 * (1 - options.top_p) * total / double(V);
    if (all) gather(weights, least > 1e-30 ? float(least) : 1e-30f);
    // The smallest key with mass(keys > it) < goal lies in [low, high]; undecided candidates are those inside.
    uint32_t low = order_key(smallest(kept_x, n)), high = order_key(best);
    i64 open = n, settled_tokens = 0;
    double settled = 0;  // mass of the keys > high
    for (int step = 0; low < high && open > 1; step++) {
      const uint32_t middle = between(low, high, step);
      const double above = settled + mass_above(kept_x, kept_w, open, key_value(middle));
      const bool enough = above >= goal;
      if (enough) low = middle + 1;
      else high = middle, settled = above;
      const i64 before = open;
      open = partition(kept_x, kept_w, open, key_value(middle), enough);
      if (!enough) settled_tokens += before - open;
    }
    const float last = open == 1 ? kept_x[0] : key_value(low);
    const double weight = open ? double(kept_w[0]) : 0;
    i64 equals = 0;
    for (double before = settled; before < goal && equals < open; before += weight) equals++;
    return {last, equals, settled_tokens + equals, equals == open};
  }
  static float smallest(const float* values, i64 count) {
    F least = set(__builtin_inff());
    for_lanes(count, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F v = load_lanes(values + c, k);
      least = min(k == L ? v : select(first_n(k), v, least), least);
    });
    return -hmax(zero() - least);
  }
  // A key in [low, high): halves the values at first, as that halves most nuclei, then the keys, which always ends.
  static uint32_t between(uint32_t low, uint32_t high, int step) {
    if (step < 12) {
      const uint32_t key = order_key(0.5f * key_value(low) + 0.5f * key_value(high));
      if (key >= low && key < high) return key;
    }
    return low + (high - low) / 2;
  }
};
