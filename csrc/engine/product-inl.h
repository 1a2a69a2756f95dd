// y[m][0..32) = x[m] W^T for one panel of packed weights (format.h), in register tiles of R rows x V vectors.
//
// With one row the floor is the read of the weights: each line is asked for kAhead bytes before its use. With many rows
// it is arithmetic: V weight vectors are loaded once for R rows, and packed ones are unpacked before, for all rows.
// Sums run over k in order, whatever the tile.
#include "dot-inl.h"
#include "tiles-inl.h"

constexpr i64 kUnpackedRows = 16;  // from so many rows on a panel is unpacked first

constexpr int kVectors = int(kPanel / L);
constexpr int kTileVectors = kVectors < 2 ? kVectors : 2;  // with many rows; with one all of the panel
constexpr int kFloatRows = L == 16 ? 8 : L == 8 ? 6 : 4, kByteRows = L == 16 ? 6 : 2;

// ---- floats -------------------------------------------------------------------------------------------------------

// acc[r] += x[m + r][k .. k + 1] . b
template <int R, int V> INL void add_pairs(const I (&b)[V], const Activations& x, i64 m, i64 k, F (&acc)[R][V]) {
  UNROLL_FOR (int r = 0; r < R; r++) {
    if constexpr (kPairs) {
      const I a = broadcast4(x.bf16 + (m + r) * x.stride + k);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = dot_pairs(acc[r][v], b[v], a);
    } else {
      const float* a = x.f32 + (m + r) * x.f32_stride + k;
      const F even = set(a[0]), odd = set(a[1]);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(odd, high_half(b[v]), fma(even, low_half(b[v]), acc[r][v]));
    }
  }
}
// A step along k: kDepth values of x, kBytes of the panel, V vectors from output N on. N is a constant: as a variable
// it costs an address for every load, more than there are registers.
struct FloatStep {
  static constexpr i64 kDepth = 1, kBytes = kPanel * 4;
  explicit FloatStep(const char*) {}
  template <int R, int V, int N>
  INL_MEMBER void run(const char* w, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    F b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = load(reinterpret_cast<const float*>(w) + N + v * L);
    UNROLL_FOR (int r = 0; r < R; r++) {
      const F a = set(x.f32[(m + r) * x.f32_stride + k]);
      UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
};
// Unpacked bf16: [K/2][32] pairs of neighbours along k.
struct PairStep {
  static constexpr i64 kDepth = 2, kBytes = kPanel * 4;
  explicit PairStep(const char*) {}
  template <int R, int V, int N>
  INL_MEMBER void run(const char* w, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = iload(w + (N + v * L) * 4);
    add_pairs<R, V>(b, x, m, k, acc);
  }
};
// Packed bf16. The nibbles of a word, from the lowest: of outputs n and n + 16 at one k, and of both two k further on.
struct Bf16Step {
  static constexpr i64 kDepth = 4, kBytes = group_bytes(Format::bf16) / 8;
  const Exponents exponents;
  explicit Bf16Step(const char* panel) : exponents(panel) {}

  template <int H>  // pairs k + 2H of outputs n to n + L
  INL_MEMBER I pairs(const char* w, int n) const {
    const I nibbles = iload(w + n % 16 * 4);
    const I signs_and_fractions = spread_bytes(w + 64 + H * 64 + n * 2);
    return merge(signs_and_fractions,
                 n < 16 ? exponents.of(shr(nibbles, 8 * H)) : exponents.of(shr(nibbles, 8 * H + 4)));
  }
  template <int R, int V, int N>
  INL_MEMBER void run(const char* w, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) const {
    I b[V];
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = pairs<0>(w, N + v * L);
    add_pairs<R, V>(b, x, m, k, acc);
    UNROLL_FOR (int v = 0; v < V; v++) b[v] = pairs<1>(w, N + v * L);
    add_pairs<R, V>(b, x, m, k + 2, acc);
  }
};
static void unpack_bf16(const char* w, i64 K, char* pairs) {
  const Bf16Step step(w);
  w += header_bytes(Format::bf16);
  for (i64 k = 0; k < K; k += Bf16Step::kDepth, w += Bf16Step::kBytes, pairs += 2 * PairStep::kBytes)
    UNROLL_FOR (int n = 0; n < kPanel; n += L) {
      istore(pairs + n * 4, step.pairs<0>(w, n));
      istore(pairs + PairStep::kBytes + n * 4, step.pairs<1>(w, n));
    }
}

template <class Step, int R, int V, int N>
static void float_tile(const Step& step, const char* w, const Activations& x, i64 m, i64 K, float* y, i64 ldy) {
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 k = 0; k < K; k += Step::kDepth, w += Step::kBytes) {
    if (R == 1) prefetch_range(w + kAhead, Step::kBytes);
    step.template run<R, V, N>(w, x, m, k, acc);
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store(y + r * ldy + N + v * L, acc[r][v]);
}

// ---- bytes --------------------------------------------------------------------------------------------------------

// Quad q of a group, k = 4q .. 4q + 3: four unsigned bytes for each of L outputs from n on.
struct Int8Quads {
  static constexpr Format kFormat = Format::int8;
  INL I quad(const char* w, int n, int q) { return iload(w + (q * kPanel + n) * 4); }
  INL I dot(I acc, I w, I x) { return dot4(acc, w, x); }
};
struct Int4Quads {
  static constexpr Format kFormat = Format::int4;
  INL I quad(const char* w, int n, int q) {
    const I two = iload(w + (q % 4 * kPanel + n) * 4);
    return iand(q < 4 ? two : shr(two, 4), iset(0x0f0f0f0fu));
  }
  INL I dot(I acc, I w, I x) { return dot4_small(acc, w, x); }
};
struct Int6Quads {
  static constexpr Format kFormat = Format::int6;
  INL I quad(const char* w, int n, int q) {
    const I high = iload(w + (q / 4 * kPanel + n) * 4), low = Int4Quads::quad(w + 2 * kPanel * 4, n, q);
    const int j = q % 4;
    return ior(low, iand(j < 2 ? shl(high, 4 - 2 * j) : shr(high, 2 * j - 4), iset(0x30303030u)));
  }
  INL I dot(I acc, I w, I x) { return dot4_small(acc, w, x); }
};
template <Format F, const int8_t (&LEVELS)[16]> struct LevelQuads {
  static constexpr Format kFormat = F;
  struct Table {
    alignas(16) uint8_t byte[16];
    constexpr Table() : byte() {
      for (int i = 0; i < 16; i++) byte[i] = uint8_t(LEVELS[i] + weight_offset(F));
    }
  };
  static constexpr Table kTable{};
  INL I quad(const char* w, int n, int q) { return lookup16(kTable.byte, Int4Quads::quad(w, n, q)); }
  INL I dot(I acc, I w, I x) { return dot4(acc, w, x); }
};
using Nf4Quads = LevelQuads<Format::nf4, kNf4>;
using Q4Quads = LevelQuads<Format::q4, kQ4>;

template <class U> static void unpack_bytes(const char* w, i64 K, char* to) {
  constexpr i64 kScales = kPanel * 2;
  for (i64 k = 0; k < K; k += kGroup, w += group_bytes(U::kFormat), to += group_bytes(Format::int8)) {
    __builtin_memcpy(to, w, kScales);
    UNROLL_FOR (int q = 0; q < 8; q++)
      UNROLL_FOR (int n = 0; n < kPanel; n += L)
        istore(to + kScales + (q * kPanel + n) * 4, U::quad(w + kScales, n, q));
  }
}

// Integer sums within a group: x . w = scale_x scale_w (start + sum of x_q (w_q + offset)).
template <class U, int R, int V, int N>
static void byte_tile(const char* w, const Activations& x, i64 m, i64 K, float* y, i64 ldy) {
  constexpr i64 kBytes = group_bytes(U::kFormat), kLines = kBytes / 64;
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 g = 0; g * kGroup < K; g++, w += kBytes) {
    I sum[R][V];
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I start = broadcast4(x.acc_init + (m + r) * (x.stride / kGroup) + g);
      UNROLL_FOR (int v = 0; v < V; v++) sum[r][v] = start;
    }
    const int8_t* q = x.q + m * x.stride + g * kGroup;
    UNROLL_FOR (int i = 0; i < 8; i++) {
      // in the order of the memory: one after the other, or both nibbles of a byte together
      const int j = U::kFormat == Format::int8 ? i : i / 2 + 4 * (i % 2);
      if (R == 1) prefetch_range(w + kAhead + kLines * i / 8 * 64, (kLines * (i + 1) / 8 - kLines * i / 8) * 64);
      I quad[V];
      UNROLL_FOR (int v = 0; v < V; v++) quad[v] = U::quad(w + kPanel * 2, N + v * L, j);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const I a = broadcast4(q + r * x.stride + 4 * j);
        UNROLL_FOR (int v = 0; v < V; v++) sum[r][v] = U::dot(sum[r][v], quad[v], a);
      }
    }
    UNROLL_FOR (int v = 0; v < V; v++) {
      const F scale = load_f16(reinterpret_cast<const uint16_t*>(w) + N + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F both_scales = scale * set(x.scale[(m + r) * (x.stride / kGroup) + g]);
        acc[r][v] = fma(to_float_signed(sum[r][v]), both_scales, acc[r][v]);
      }
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store(y + r * ldy + N + v * L, acc[r][v]);
}

// ---- products -----------------------------------------------------------------------------------------------------

// tile<N>() for the outputs N of a panel in steps of V vectors
template <int V, int N = 0, class Tile> INL void tiles_of_panel(Tile tile) {
  tile.template operator()<N>();
  if constexpr (N + V * L < kPanel) tiles_of_panel<V, N + V * L>(tile);
}
template <class Step>
static void float_product(const Step& step, const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M == 1) return float_tile<Step, 1, kVectors, 0>(step, w, x, 0, K, y, ldy);
  constexpr int V = kTileVectors;
  tiles_of_panel<V>([&]<int N> {
    rows_of_tiles<kFloatRows>(M, [&]<int R>(i64 m) { float_tile<Step, R, V, N>(step, w, x, m, K, y + m * ldy, ldy); });
  });
}
static void bf16_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M < kUnpackedRows) return float_product(Bf16Step(w), w + header_bytes(Format::bf16), x, M, K, y, ldy);
  char* pairs = static_cast<char*>(scratch(size_t(K * kPanel * 2)));
  unpack_bf16(w, K, pairs);
  float_product(PairStep(pairs), pairs, x, M, K, y, ldy);
}
template <class U> static void byte_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M == 1) return byte_tile<U, 1, kVectors, 0>(w, x, 0, K, y, ldy);
  if (U::kFormat != Format::int8 && M >= kUnpackedRows) {
    char* bytes = static_cast<char*>(scratch(size_t(panel_bytes(Format::int8, K))));
    unpack_bytes<U>(w, K, bytes);
    return byte_product<Int8Quads>(bytes, x, M, K, y, ldy);
  }
  constexpr int V = kTileVectors;
  tiles_of_panel<V>([&]<int N> {
    rows_of_tiles<kByteRows>(M, [&]<int R>(i64 m) { byte_tile<U, R, V, N>(w, x, m, K, y + m * ldy, ldy); });
  });
}
static void product(Format f, const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  switch (f) {
    case Format::f32: return float_product(FloatStep(w), w, x, M, K, y, ldy);
    case Format::bf16: return bf16_product(w, x, M, K, y, ldy);
    case Format::int8: return byte_product<Int8Quads>(w, x, M, K, y, ldy);
    case Format::int6: return byte_product<Int6Quads>(w, x, M, K, y, ldy);
    case Format::int4: return byte_product<Int4Quads>(w, x, M, K, y, ldy);
    case Format::nf4: return byte_product<Nf4Quads>(w, x, M, K, y, ldy);
    case Format::q4: return byte_product<Q4Quads>(w, x, M, K, y, ldy);
  }
}

static void fill(Kernels& k) { k.product = product; }
