// Products with weights in int8, and in nf4 and q4, whose levels are bytes; see byte_tile-inl.h.
#include "byte_tile-inl.h"

struct Int8Quads : HalfScales<Format::int8> {
  static constexpr bool kSigned = kSignedBytes;
  explicit Int8Quads(const uint8_t*) {}
  INL_MEMBER I quad(const char* w, int n, int q) const { return iload(w + (q * kPanel + n) * 4); }
  INL_MEMBER I dot(I acc, I w, I x) const { return dot4(acc, w, x); }
};
// nf4 and q4: a nibble is an index into a table of bytes.
struct LevelQuads : HalfScales<Format::nf4> {  // q4 has the same layout
  static constexpr bool kSigned = kSignedBytes;
  static constexpr bool kRolled = L != 8;  // AVX2: 0.93 of the speed
  const Lookup16 bytes;
  explicit LevelQuads(const uint8_t* levels) : bytes(levels) {}
  INL_MEMBER I quad(const char* w, int n, int q) const { return bytes.of(Int4Quads::nibbles(w, n, q)); }
  INL_MEMBER I dot(I acc, I w, I x) const { return dot4(acc, w, x); }
};
constexpr LevelTable kNf4Bytes(Format::nf4, kNf4), kQ4Bytes(Format::q4, kQ4);

static void int8_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  byte_product<Int8Quads>(nullptr, w, x, M, K, y, ldy);
}
static void nf4_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  byte_product<LevelQuads>(kNf4Bytes.byte, w, x, M, K, y, ldy);
}
static void q4_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  byte_product<LevelQuads>(kQ4Bytes.byte, w, x, M, K, y, ldy);
}
static void unpack_nf4(const char* w, i64 K, char* to) { unpack_quads<LevelQuads>(kNf4Bytes.byte, w, K, to); }
static void unpack_q4(const char* w, i64 K, char* to) { unpack_quads<LevelQuads>(kQ4Bytes.byte, w, K, to); }

static void fill(Kernels& k) {
  k.product[int(Format::int8)] = int8_product;
  k.product[int(Format::nf4)] = nf4_product;
  k.product[int(Format::q4)] = q4_product;
  k.unpack[int(Format::nf4)] = unpack_nf4;
  k.unpack[int(Format::q4)] = unpack_q4;
}
