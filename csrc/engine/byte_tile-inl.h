// Products with weights in bytes and less: the tile, and the quads that more than one unit reads.
#pragma once
#include "product_tiles-inl.h"

constexpr int kByteRows = L == 16 ? 6 : kNeon ? 4 : 2;

// The scales of a group, before its codes: of L outputs from n on.
template <Format F_> struct HalfScales {
  static constexpr Format kFormat = F_;
  static constexpr i64 kScales = kPanel * 2, kBytes = group_bytes(F_);  // of them, and of a group
  static constexpr bool kRolled = true;  // whether tiles of rows may have a loop over the quads
  INL F scales(const char* group, int n) { return load_f16(reinterpret_cast<const uint16_t*>(group) + n); }
};
// Quad q of a group, k = 4q .. 4q + 3: four unsigned bytes for each of L outputs from n on. Each is made from the 16
// bytes that its codes stand for, or from null. Functions get these bytes and not the quads: a vector as an argument
// would make the compiler leave out vzeroupper, and code without wide registers is slower then.
struct Int4Quads : HalfScales<Format::int4> {
  static constexpr bool kSigned = false;  // whether dot multiplies w - 128
  explicit Int4Quads(const uint8_t*) {}
  INL_MEMBER I quad(const char* w, int n, int q) const { return nibbles(w, n, q); }
  INL I nibbles(const char* w, int n, int q) {
    const I two = iload(w + (q % 4 * kPanel + n) * 4);
    return iand(q < 4 ? two : shr(two, 4), iset(0x0f0f0f0fu));
  }
  INL_MEMBER I dot(I acc, I w, I x) const { return dot4_small(acc, w, x); }
};

struct LevelTable {
  alignas(16) uint8_t byte[16];
  constexpr LevelTable(Format f, const int8_t (&levels)[16]) : byte() {
    for (int i = 0; i < 16; i++) byte[i] = uint8_t(levels[i] + weight_offset(f));
  }
};

template <class U> static void unpack_quads(const uint8_t* levels, const char* w, i64 K, char* to) {
  const U quads(levels);
  constexpr i64 kScales = U::kScales;
  // where w - 128 is multiplied bytes get the offset of int8, else they keep that of their format (Activations::acc_init)
  constexpr uint32_t kMore = kSignedBytes ? 0x01010101u * uint32_t(128 - weight_offset(U::kFormat)) : 0;
  for (i64 k = 0; k < K; k += kGroup, w += group_bytes(U::kFormat), to += group_bytes(Format::int8)) {
    __builtin_memcpy(to, w, kScales);
    UNROLL_FOR (int q = 0; q < 8; q++)
      UNROLL_FOR (int n = 0; n < kPanel; n += L)
        istore(to + kScales + (q * kPanel + n) * 4,
               kMore ? iadd(quads.quad(w + kScales, n, q), iset(kMore)) : quads.quad(w + kScales, n, q));
  }
}

// Clang would load what all steps of a group need before the first, and spill the sums to have registers for it: a step's
// address is made to depend on a sum of the step before, in no instruction.
#if defined(__clang__) && defined(__x86_64__) && !defined(GPTFAST_SCALAR)
#define AFTER(sum, address) asm("" : "+v"(sum), "+r"(address))
#else
#define AFTER(sum, address)
#endif

// Unrolled, products of three instructions are moved ahead until the sums are spilled. Those of one are not, and are
// no slower unrolled.
#if defined(__AVX512VNNI__) || defined(GPTFAST_SCALAR) || defined(GPTFAST_NEON)
constexpr bool kRolls = false;
#else
constexpr bool kRolls = true;
#endif

// Integer sums within a group: x . w = scale_x scale_w (start + sum of x_q (w_q + offset)); start is 0 where dot takes the
// offset off.
template <class U, int R, int V, class N>
static void byte_tile(const uint8_t* levels, const char* w, N n, const Activations& x, i64 m, i64 K, float* y,
                      i64 ldy) {
  const U quads(levels);
  constexpr i64 kBytes = U::kBytes, kLines = kBytes / 64;
  F acc[R][V];
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) acc[r][v] = zero();
  for (i64 g = 0; g * kGroup < K; g++, w += kBytes) {
    I sum[R][V];
    UNROLL_FOR (int r = 0; r < R; r++) {
      const I start = U::kSigned ? iset(0) : broadcast4(x.acc_init + (m + r) * (x.stride / kGroup) + g);
      UNROLL_FOR (int v = 0; v < V; v++) sum[r][v] = start;
    }
    const int8_t* q = x.q + m * x.stride + g * kGroup;
    // in the order of the memory: one after the other, or both nibbles of a byte together
    const auto step = [&](int pair, int second) __attribute__((always_inline)) {
      if constexpr (R > 1) {
        AFTER(sum[0][0], q);
      }
      const int i = 2 * pair + second, j = U::kFormat == Format::int8 ? i : pair + 4 * second;
      if (R == 1) prefetch_range(w + kAhead + kLines * i / 8 * 64, (kLines * (i + 1) / 8 - kLines * i / 8) * 64);
      I quad[V];
      UNROLL_FOR (int v = 0; v < V; v++) quad[v] = quads.quad(w + U::kScales, n + v * L, j);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const I a = broadcast4(q + r * x.stride + 4 * j);
        UNROLL_FOR (int v = 0; v < V; v++) sum[r][v] = quads.dot(sum[r][v], quad[v], a);
      }
    };
    if constexpr (R > 1 && kRolls && U::kRolled) {
      ROLLED_FOR (int pair = 0; pair < 4; pair++) step(pair, 0), step(pair, 1);
    } else {
      UNROLL_FOR (int pair = 0; pair < 4; pair++) step(pair, 0), step(pair, 1);
    }
    UNROLL_FOR (int v = 0; v < V; v++) {
      const F scale = U::scales(w, n + v * L);
      UNROLL_FOR (int r = 0; r < R; r++) {
        const F both_scales = scale * set(x.scale[(m + r) * (x.stride / kGroup) + g]);
        acc[r][v] = fma(to_float_signed(sum[r][v]), both_scales, acc[r][v]);
      }
    }
  }
  UNROLL_FOR (int r = 0; r < R; r++)
    UNROLL_FOR (int v = 0; v < V; v++) store(y + r * ldy + n + v * L, acc[r][v]);
}

#ifdef GPTFAST_MATRIX
#include "byte_matrix-inl.h"
#endif

// Apart from byte_product: what its lambdas capture would cost a single row a frame.
template <class U>
APART static void byte_rows(const uint8_t* levels, const char* w, const Activations& x, i64 M, i64 K, float* y,
                            i64 ldy) {
  constexpr int V = kTileVectors;
  tiles_of_panel<V, kOneBody || L == 8>([&](auto n) {
    rows_of_tiles<kByteRows>(M, [&]<int R>(i64 m) {
#ifdef GPTFAST_MATRIX
      if constexpr (R > 1) return byte_matrix<U, R, V>(levels, w, n, x, m, K, y + m * ldy, ldy);
#endif
      byte_tile<U, R, V>(levels, w, n, x, m, K, y + m * ldy, ldy);
    });
  });
}
template <class U>
static void byte_product(const uint8_t* levels, const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  if (M == 1) return byte_tile<U, 1, kVectors>(levels, w, Output<0>(), x, 0, K, y, ldy);
  byte_rows<U>(levels, w, x, M, K, y, ldy);
}
