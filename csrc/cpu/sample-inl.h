// One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary.
//
// Ranking is by logit, ties to the lowest id. Logits are compared as ordered integers, so thresholds are exact: the
// k-th largest and the last of the nucleus are found by bisection on the 32 bits of the key, over ever fewer candidates.
//   top-k   keeps keys > K and, of those equal to K, the lowest ids until k are kept
//   top-p   keeps a token while the mass ranked before it is < p of what top-k left
// The draw is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030) with noise -log(-log1p(-v)), v
// from Philox at counter (t >> 2, position, stream, "samp"), word t & 3: a function of the coordinates alone.
//
// Floor: one read of the row from memory; it then stays in L2 (201 KB at V = 50257).

// Order-preserving map of floats to unsigned integers, and the largest noise there is: v = 2^-33.
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
constexpr float kMostNoise = 22.88f;  // -log(-log1p(-(1 - 2^-24))) is small; -log(2^-33) = 22.874 at the other end

struct Sampler {
  const SampleParams& p;
  const i64 V, padded;
  float *x, *kept_x;
  uint32_t *ids, *kept_ids;  // candidates: their logits and ids, ids rising
  i64 n = 0;                 // how many candidates

  static size_t bytes(i64 V) { return size_t(round_up(V + L, 16)) * 16; }
  explicit Sampler(const SampleParams& params) : p(params), V(p.V), padded(round_up(V + L, 16)) {
    x = static_cast<float*>(scratch(bytes(V)));
    kept_x = x + padded;
    ids = reinterpret_cast<uint32_t*>(kept_x + padded);
    kept_ids = ids + padded;
  }

  // -1: a nan; otherwise the lowest id of the largest logit. Leaves the row in x.
  i64 read(i64 r) {
    if (p.logits.dtype == DType::f32) __builtin_memcpy(x, row(p.logits, r), size_t(V) * 4);
    else widen_row(x, row(p.logits, r), p.logits.dtype, V);
    F top = set(-__builtin_inff());
    unsigned ordered = ~0u;
    for_lanes(V, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F v = load_lanes(x + c, k);
      ordered &= bits(eq(v, v));
      top = max(k == L ? v : select(first_n(k), v, top), top);
    });
    if ((ordered & ((1u << L) - 1)) != (1u << L) - 1) return -1;
    const F best = set(hmax(top));
    for (i64 c = 0; c < V; c += L) {
      const unsigned hit = bits(eq(load_lanes(x + c, V - c < L ? V - c : L), best)) &
                           (V - c < L ? (1u << (V - c)) - 1 : (1u << L) - 1);
      if (hit) return c + __builtin_ctz(hit);
    }
    return 0;
  }

  // Candidates with logit >= low, in id order, from the whole row.
  void gather(float low) {
    n = 0;
    const F bound = set(low);
    for_lanes(V, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const F v = load_lanes(x + c, k);
      const M m = k == L ? ge(v, bound) : both(ge(v, bound), first_n(k));
      if (!bits(m)) return;
      compress(kept_x + n, as_int(v), m);
      n += compress(kept_ids + n, iadd(iset(uint32_t(c)), iota()), m);
    });
  }
  i64 count_ge(const float* values, i64 count, float low) const {
    i64 total = 0;
    for_lanes(count, [&](i64 c, i64 k) __attribute__((always_inline)) {
      const M m = ge(load_lanes(values + c, k), set(low));
      total += __builtin_popcount(bits(k == L ? m : both(m, first_n(k))));
    });
    return total;
  }

  // Leaves the k best as candidates: those above the k-th largest logit, and the lowest ids among its equals.
  void top_k(i64 k, float best) {
    uint32_t low = order_key(-__builtin_inff()), high = order_key(best);  // count(key >= low) >= k; look for the largest such key
    const float* values = x;
    i64 count = V;
    while (low < high) {
      const uint32_t middle = high - (high - low) / 2;
      if (count_ge(values, count, key_value(middle)) >= k) {
        low = middle;
        if (count > 4096 || values == x) {  // fewer candidates, once they are much fewer
          const i64 left = count_ge(values, count, key_value(low));
          if (left * 4 < count) {
            gather(key_value(low));
            values = kept_x;
            count = n;
          }
        }
      } else {
        high = middle - 1;
      }
    }
    gather(key_value(low));
    i64 above = 0, out = 0;
    for (i64 c = 0; c < n; c++) above += kept_x[c] > key_value(low);
    i64 equal = k - above;
    for (i64 c = 0; c < n; c++) {
      if (!(kept_x[c] > key_value(low)) && equal-- <= 0) continue;
      kept_x[out] = kept_x[c];
      kept_ids[out++] = kept_ids[c];
    }
    n = out;
  }

  // exp((x - best) / T), on values that are candidates
  INL F weight(F v, F best, F per_degree) { return exp2<6>((v - best) * per_degree); }
  double mass_above(const float* values, i64 count, float bound, float best, float per_degree) const {
    double total = 0;
    for (i64 c0 = 0; c0 < count; c0 += 1024) {
      F s = zero();
      const i64 end = count - c0 < 1024 ? count - c0 : 1024;
      for_lanes(end, [&](i64 c, i64 k) __attribute__((always_inline)) {
        const F v = load_lanes(values + c0 + c, k);
        const M m = lt(set(bound), v);
        if (!bits(m)) return;
        s = s + keep(k == L ? m : both(m, first_n(k)), weight(v, set(best), set(per_degree)));
      });
      total += double(sum(s));
    }
    return total;
  }

  // Leaves the nucleus: the fewest best candidates whose mass reaches top_p of all.
  void top_p(float best) {
    const float per_degree = kLog2e / p.temperature;
    const double goal = double(p.top_p) * mass_above(kept_x, n, -__builtin_inff(), best, per_degree);
    uint32_t low = order_key(-__builtin_inff()), high = order_key(best);  // the smallest key with mass(keys > it) < goal lies in [low, high]
    double settled = 0;                        // mass of candidates that are above every key still in question
    float* values = x;                         // the row itself is not needed any more: a work list of the undecided
    __builtin_memcpy(values, kept_x, size_t(n) * 4);
    i64 count = n;
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      const double above = settled + mass_above(values, count, key_value(middle), best, per_degree);
      if (above < goal) high = middle;
      else low = middle + 1;
      if (count > 64) {  // drop what is decided: keys > high are in, keys < low stay out of every later sum
        i64 left = 0;
        double in = 0;
        for (i64 c = 0; c < count; c += L) {
          const i64 k = count - c < L ? count - c : L;
          const F v = load_lanes(values + c, k);
          const M valid = first_n(k), over = both(lt(set(key_value(high)), v), valid);
          if (bits(over)) in += double(sum(keep(over, weight(v, set(best), set(per_degree)))));
          const M open = both(both(ge(set(key_value(high)), v), ge(v, set(key_value(low)))), valid);
          left += compress(values + left, as_int(v), open);
        }
        settled += in;
        count = left;
      }
    }
    double before = settled + mass_above(values, count, key_value(low), best, per_degree);
    i64 out = 0;
    for (i64 c = 0; c < n; c++) {
      const bool above = kept_x[c] > key_value(low);
      const bool equal = kept_x[c] == key_value(low);
      if (!above && !(equal && before < goal)) continue;
      if (equal) {
        float w[L];
        store(w, weight(set(kept_x[c]), set(best), set(per_degree)));
        before += double(w[0]);
      }
      kept_x[out] = kept_x[c];
      kept_ids[out++] = kept_ids[c];
    }
    n = out;
  }

  // argmax of logit / T + noise over the candidates, ties to the lowest id (ids rise).
  i64 draw(i64 r) const {
    const Wide position = widen(uint32_t(p.position[r])), stream = widen(uint32_t(p.stream[r]));
    const Wide domain = widen(0x73616d70u);
    const F temperature = set(p.temperature);
    float best = -__builtin_inff();
    i64 chosen = kept_ids[0];
    for (i64 c = 0; c < n; c += L) {
      const i64 k = n - c < L ? n - c : L;
      const F base = load_lanes(kept_x + c, k) / temperature;
      const M valid = k == L ? first_n(L) : first_n(k);
      const M hopeful = both(valid, ge(base + set(kMostNoise), set(best)));
      if (!bits(hopeful)) continue;
      const I id = iload(kept_ids + c);
      I out[4];
      philox(uint32_t(p.seed), uint32_t(p.seed >> 32), widen(shr(id, 2)), position, stream, domain, out);
      const I word = iand(id, iset(3));
      I bits32 = iselect(ieq(word, iset(0)), out[0], out[1]);
      bits32 = iselect(ieq(word, iset(2)), out[2], bits32);
      bits32 = iselect(ieq(word, iset(3)), out[3], bits32);
      const F v = min(fma(to_float(bits32), set(0x1p-32f), set(0x1p-33f)), set(1.f - 0x1p-24f));
      const F noise = zero() - log(zero() - log1p_negative(zero() - v));
      const F score = select(valid, base + noise, set(-__builtin_inff()));
      const float top = hmax(score);
      if (!(top > best)) continue;
      best = top;
      chosen = kept_ids[c + __builtin_ctz(bits(both(eq(score, set(top)), valid)))];
    }
    return chosen;
  }

  i64 one(i64 r) {
    const i64 first = read(r);
    if (first < 0) return -1;
    const float best = x[first];
    if (p.temperature == 0.f) return first;
    if (best == -__builtin_inff()) return -2;
    if (p.top_k > 0 && p.top_k < V) top_k(p.top_k, best);
    else gather(-3.4028235e38f);  // all but -inf
    if (p.top_p < 1.f) top_p(best);
    return draw(r);
  }
};

// out[r]: the token, -1 where the row holds nan, -2 where nothing but -inf.
static void sample(const SampleParams& p, i64 row_begin, i64 row_end) {
  Sampler s(p);
  for (i64 r = row_begin; r < row_end; r++) p.out[r] = s.one(r);
}
