// Products with weights in fp32 and bf16; see product_tiles-inl.h.
#include "bf16_step-inl.h"

constexpr int kFloatRows = L == 16 ? 8 : L == 8 || kNeon ? 6 : 4, kFloatVectors = kNeon ? 4 : kTileVectors;

struct FloatStep {  // see bf16_step-inl.h
  static constexpr i64 kDepth = 1, kBytes = kPanel * 4;
  explicit FloatStep(const char*) {}
  template <int R, int V, class N>
  INL_MEMBER void run(const char* w, N n, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    F b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = load(reinterpret_cast<const float*>(w) + n + v * L);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const F a = set(x.f32[(m + r) * x.f32_stride + k]);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
};
// What bf16 is unpacked to: fp32 where each tile would have to widen pairs.
template <bool PAIRS> struct Unpacked {
  using Step = FloatStep;
};
template <> struct Unpacked<true> {
  using Step = PairStep;
};
using UnpackedStep = Unpacked<kPairs>::Step;
INL void store_pairs(char* to, I pairs) {
  if constexpr (kPairs) return istore(to, pairs);
  store(reinterpret_cast<float*>(to), low_half(pairs));
  store(reinterpret_cast<float*>(to) + kPanel, high_half(pairs));
}
static void unpack_bf16(const char* w, i64 K, char* to) {
  constexpr i64 kPair = 2 / UnpackedStep::kDepth * UnpackedStep::kBytes;
  const Bf16Step step(w);
  w += header_bytes(Format::bf16);
  for (i64 k = 0; k < K; k += Bf16Step::kDepth, w += Bf16Step::kBytes, to += 2 * kPair)
    UNROLL_FOR (int n = 0; n < kPanel; n += L) {
      store_pairs(to + n * 4, step.pairs<0>(w, n));
      store_pairs(to + kPair + n * 4, step.pairs<1>(w, n));
    }
}

#ifdef GPTFAST_MATRIX
#include "product_matrix-inl.h"
#endif

template <class Step, int R, int V, class N>
static void float_tile(const Step& step, const char* w, N n, const Activations& x, i64 m, i64 K, float* y, i64 ldy) {
#ifdef GPTFAST_MATRIX
  if constexpr (R > 1 && Step::kDepth > 1) return pair_matrix<Step, R, V>(step, w, n, x, m, K, y, ldy);
#endif
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 k = 0; k < K; k += Step::kDepth, w += Step::kBytes) {
    if (R == 1) prefetch_range(w + kAhead, Step::kBytes);
    step.template run<R, V>(w, n, x, m, k, acc);
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store(y + r * ldy + n + v * L, acc[r][v]);
}

template <class Step>
static void float_product(const Step& step, const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M == 1) return float_tile<Step, 1, kVectors>(step, w, Output<0>(), x, 0, K, y, ldy);
  constexpr int V = kFloatVectors;
  tiles_of_panel<V>([&](auto n) {
    rows_of_tiles<kFloatRows>(M, [&]<int R>(i64 m) { float_tile<Step, R, V>(step, w, n, x, m, K, y + m * ldy, ldy); });
  });
}
static void bf16_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M < kUnpackedRows) return float_product(Bf16Step(w), w + header_bytes(Format::bf16), x, M, K, y, ldy);
  char* unpacked = static_cast<char*>(scratch(size_t(K / UnpackedStep::kDepth * UnpackedStep::kBytes)));
  unpack_bf16(w, K, unpacked);
  float_product(UnpackedStep(unpacked), unpacked, x, M, K, y, ldy);
}
static void f32_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  float_product(FloatStep(w), w, x, M, K, y, ldy);
}

static void fill(Kernels& k) {
  k.product[int(Format::f32)] = f32_product;
  k.product[int(Format::bf16)] = bf16_product;
}
