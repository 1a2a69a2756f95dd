// Products with weights in int6 and int4, whose codes are below 128: dot4_small; see byte_tile-inl.h.
#include "byte_tile-inl.h"

struct Int6Quads : HalfScales<Format::int6> {
  static constexpr bool kSigned = false, kRolled = false;  // each quad has shifts of its own
  explicit Int6Quads(const uint8_t*) {}
  INL_MEMBER I quad(const char* w, int n, int q) const {
    const I high = iload(w + (q / 4 * kPanel + n) * 4), low = Int4Quads::nibbles(w + 2 * kPanel * 4, n, q);
    const int j = q % 4;
    return ior(low, iand(j < 2 ? shl(high, 4 - 2 * j) : shr(high, 2 * j - 4), iset(0x30303030u)));
  }
  INL_MEMBER I dot(I acc, I w, I x) const { return dot4_small(acc, w, x); }
};

static void int6_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  byte_product<Int6Quads>(nullptr, w, x, M, K, y, ldy);
}
static void int4_product(const char* w, const Activations& x, i64 M, i64 K, float* y, i64 ldy) {
  byte_product<Int4Quads>(nullptr, w, x, M, K, y, ldy);
}
static void unpack_int6(const char* w, i64 K, char* to) { unpack_quads<Int6Quads>(nullptr, w, K, to); }
static void unpack_int4(const char* w, i64 K, char* to) { unpack_quads<Int4Quads>(nullptr, w, K, to); }

static void fill(Kernels& k) {
  k.product[int(Format::int6)] = int6_product;
  k.product[int(Format::int4)] = int4_product;
  k.unpack[int(Format::int6)] = unpack_int6;
  k.unpack[int(Format::int4)] = unpack_int4;
}
