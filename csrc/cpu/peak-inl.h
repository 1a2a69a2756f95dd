// The arithmetic limit of one core: independent fused multiply-adds on registers. Returns flops done.
#define GPTFAST_OPAQUE(x) asm volatile("" : IN_VECTOR(x))  // not merged with its neighbours
#ifdef GPTFAST_PAIRS
INL F most_products(F acc, F a, F b) {
#ifdef GPTFAST_MATRIX
  return vbfmmlaq_f32(acc, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
#else
  return multiply_pairs(acc, as_int(a), as_int(b));
#endif
}
#endif
static double peak_flops(i64 iterations, bool pairs, float* sink) {
  constexpr int N = kNeon    ? 16
                    : L == 4 ? 8
                             : 12;  // in flight: latency 4 or 5 times two units (Arm: 4), within the registers
  F acc[N];
  UNROLL_FOR (int n = 0; n < N; n++) acc[n] = set(float(n));
  const F a = set(0.5f), b = set(0.25f);
  for (i64 i = 0; i < iterations; i++) {
    UNROLL_FOR (int n = 0; n < N; n++) {
#ifdef GPTFAST_PAIRS
      if (pairs) acc[n] = most_products(acc[n], a, b);
      else
#endif
        acc[n] = fma(acc[n], a, b);
      GPTFAST_OPAQUE(acc[n]);
    }
  }
  F total = zero();
  UNROLL_FOR (int n = 0; n < N; n++) total = total + acc[n];
  *sink = sum(total);
#ifdef GPTFAST_PAIRS
  if (pairs) return double(iterations) * N * L * (kNeon ? 8 : 4);
#endif
  return double(iterations) * N * L * 2;
}

static void fill(Kernels& k) {
  k.lanes = L;
  k.multiplies_pairs = kPairs;
  k.peak_flops = peak_flops;
}
