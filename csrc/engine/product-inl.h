// y[m][0..32) (+)= x[m][k0..k1) W^T for one panel of packed weights (format.h), in register tiles of R rows x V
// vectors.
//
// With one row the floor is the read of the weights: each line is asked for kAhead bytes before its use. With many rows
// it is arithmetic: V weight vectors are loaded (and unpacked) once for R rows. Sums run over k in order, whatever the
// tile.

constexpr i64 kAhead = 8192;  // bytes; measured: +23% for 4-bit weights over none, 512 does harm

constexpr int kVectors = int(kPanel / L);
constexpr int kTileVectors = kVectors < 2 ? kVectors : 2;  // with many rows; with one all of the panel
constexpr int kFloatRows = L == 16 ? 8 : L == 8 ? 6 : 4, kByteRows = L == 16 ? 6 : 2;

INL void ahead(const char* w, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(w + kAhead + i, 0, 3);
}

// One step along k reads `kWords` of x and a vector of words per V of the panel.
struct FloatStep {
  static constexpr i64 kDepth = 1;
  template <int R, int V>
  INL void run(const char* w, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) {
    F b[V];
    UNROLL for (int v = 0; v < V; v++)
      b[v] = load(reinterpret_cast<const float*>(w) + v * L);
    UNROLL for (int r = 0; r < R; r++) {
      const F a = set(x.f32[(m + r) * x.f32_stride + k]);
      UNROLL for (int v = 0; v < V; v++)
        acc[r][v] = fma(a, b[v], acc[r][v]);
    }
  }
};
struct PairStep {
  static constexpr i64 kDepth = 2;
  template <int R, int V>
  INL void run(const char* w, const Activations& x, i64 m, i64 k, F (&acc)[R][V]) {
    I b[V];
    UNROLL for (int v = 0; v < V; v++)
      b[v] = iload(w + v * L * 4);
    UNROLL for (int r = 0; r < R; r++) {
      if constexpr (kPairs) {
        const I a = broadcast4(x.bf16 + (m + r) * x.stride + k);
        UNROLL for (int v = 0; v < V; v++)
          acc[r][v] = dot_pairs(acc[r][v], b[v], a);
      } else {
        const float* a = x.f32 + (m + r) * x.f32_stride + k;
        const F even = set(a[0]), odd = set(a[1]);
        UNROLL for (int v = 0; v < V; v++)
          acc[r][v] = fma(odd, high_half(b[v]), fma(even, low_half(b[v]), acc[r][v]));
      }
    }
  }
};

template <class Step, int R, int V>
static void float_tile(const char* w, const Activations& x, i64 m, i64 k0, i64 k1, float* y, i64 ldy, bool add) {
  F acc[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < V; v++) acc[r][v] = add ? load(y + r * ldy + v * L) : zero();
  w += k0 / Step::kDepth * kPanel * 4;
  for (i64 k = k0; k < k1; k += Step::kDepth, w += kPanel * 4) {
    if (R == 1) ahead(w, V * L * 4);
    Step::template run<R, V>(w, x, m, k, acc);
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < V; v++) store(y + r * ldy + v * L, acc[r][v]);
}

// Of a group of 32 k: kLoads vectors of bytes, each of which is unpacked into kQuads vectors of four unsigned bytes.
struct Int8Unpack {
  static constexpr Format kFormat = Format::int8;
  static constexpr int kLoads = 8, kQuads = 1;
  static constexpr int kOffset = 128;
  INL I quad(I w, int) { return w; }
  INL I dot(I acc, I w, I x) { return dot4(acc, w, x); }
};
struct Int4Unpack {
  static constexpr Format kFormat = Format::int4;
  static constexpr int kLoads = 4, kQuads = 2;
  static constexpr int kOffset = 8;
  INL I quad(I w, int h) { return iand(h ? shr(w, 4) : w, iset(0x0f0f0f0fu)); }
  INL I dot(I acc, I w, I x) { return dot4_small(acc, w, x); }
};
struct Nf4Unpack {
  static constexpr Format kFormat = Format::nf4;
  static constexpr int kLoads = 4, kQuads = 2;
  static constexpr int kOffset = 128;
  alignas(16) static constexpr uint8_t kTable[16] = {kNf4[0] + 128,  kNf4[1] + 128,  kNf4[2] + 128,  kNf4[3] + 128,
                                                     kNf4[4] + 128,  kNf4[5] + 128,  kNf4[6] + 128,  kNf4[7] + 128,
                                                     kNf4[8] + 128,  kNf4[9] + 128,  kNf4[10] + 128, kNf4[11] + 128,
                                                     kNf4[12] + 128, kNf4[13] + 128, kNf4[14] + 128, kNf4[15] + 128};
  INL I quad(I w, int h) { return lookup16(kTable, Int4Unpack::quad(w, h)); }
  INL I dot(I acc, I w, I x) { return dot4(acc, w, x); }
};

// Integer sums within a group; x . w = scale_x scale_w (sum of x_q w_q - offset sum of x_q). V vectors from `column`
// on.
template <class U, int R, int V>
static void byte_tile(const char* w, i64 column, const Activations& x, i64 m, i64 k0, i64 k1, float* y, i64 ldy,
                      bool add) {
  F acc[R][V];
  UNROLL for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < V; v++) acc[r][v] = add ? load(y + r * ldy + v * L) : zero();
  w += k0 / kGroup * group_bytes(U::kFormat);
  for (i64 g = k0 / kGroup; g * kGroup < k1; g++) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(w) + column;
    if (R == 1) ahead(w, V * L * 2);
    w += kPanel * 2;
    I sum[R][V];
    UNROLL for (int r = 0; r < R; r++) {
      const I start = iset(uint32_t(-U::kOffset * x.sum[(m + r) * (x.stride / kGroup) + g]));
      UNROLL for (int v = 0; v < V; v++)
        sum[r][v] = start;
    }
    const int8_t* q = x.q + m * x.stride + g * kGroup;
    UNROLL for (int j = 0; j < U::kLoads; j++, w += kPanel * 4) {
      if (R == 1) ahead(w, V * L * 4);
      I bytes[V];
      UNROLL for (int v = 0; v < V; v++)
        bytes[v] = iload(w + (column + v * L) * 4);
      UNROLL for (int h = 0; h < U::kQuads; h++) {
        I quad[V];
        UNROLL for (int v = 0; v < V; v++)
          quad[v] = U::quad(bytes[v], h);
        UNROLL for (int r = 0; r < R; r++) {
          const I a = broadcast4(q + r * x.stride + 16 * h + 4 * j);
          UNROLL for (int v = 0; v < V; v++)
            sum[r][v] = U::dot(sum[r][v], quad[v], a);
        }
      }
    }
    UNROLL for (int v = 0; v < V; v++) {
      const F scale = load_f16(scales + v * L);
      UNROLL for (int r = 0; r < R; r++) {
        const F both_scales = scale * set(x.scale[(m + r) * (x.stride / kGroup) + g]);
        acc[r][v] = fma(to_float_signed(sum[r][v]), both_scales, acc[r][v]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++) UNROLL
    for (int v = 0; v < V; v++) store(y + r * ldy + v * L, acc[r][v]);
}

// M rows in tiles of ROWS, 4, 2, 1.
template <int ROWS, class Tile>
INL void rows_of_tiles(i64 M, Tile tile) {
  i64 m = 0;
  for (; m + ROWS <= M; m += ROWS) tile.template operator()<ROWS>(m);
  if constexpr (ROWS > 4)
    for (; m + 4 <= M; m += 4) tile.template operator()<4>(m);
  if constexpr (ROWS > 2)
    for (; m + 2 <= M; m += 2) tile.template operator()<2>(m);
  for (; m < M; m++) tile.template operator()<1>(m);
}
template <class Step>
static void float_product(const char* w, const Activations& x, i64 M, i64 k0, i64 k1, float* y, i64 ldy, bool add) {
  if (M == 1) return float_tile<Step, 1, kVectors>(w, x, 0, k0, k1, y, ldy, add);
  constexpr int V = kTileVectors;
  for (int v = 0; v < kVectors; v += V)
    rows_of_tiles<kFloatRows>(
        M, [&]<int R>(i64 m) { float_tile<Step, R, V>(w + v * L * 4, x, m, k0, k1, y + m * ldy + v * L, ldy, add); });
}
template <class U>
static void byte_product(const char* w, const Activations& x, i64 M, i64 k0, i64 k1, float* y, i64 ldy, bool add) {
  if (M == 1) return byte_tile<U, 1, kVectors>(w, 0, x, 0, k0, k1, y, ldy, add);
  for (int v = 0; v < kVectors; v += kTileVectors)
    rows_of_tiles<kByteRows>(
        M, [&]<int R>(i64 m) { byte_tile<U, R, kTileVectors>(w, v * L, x, m, k0, k1, y + m * ldy + v * L, ldy, add); });
}
static void product(Format f, const char* w, const Activations& x, i64 M, i64 k0, i64 k1, float* y, i64 ldy, bool add) {
  switch (f) {
    case Format::f32: return float_product<FloatStep>(w, x, M, k0, k1, y, ldy, add);
    case Format::bf16: return float_product<PairStep>(w, x, M, k0, k1, y, ldy, add);
    case Format::int8: return byte_product<Int8Unpack>(w, x, M, k0, k1, y, ldy, add);
    case Format::int4: return byte_product<Int4Unpack>(w, x, M, k0, k1, y, ldy, add);
    case Format::nf4: return byte_product<Nf4Unpack>(w, x, M, k0, k1, y, ldy, add);
  }
}
