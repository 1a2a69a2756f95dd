// The product of gemm_block-inl.h on AMX: C in four tiles of 16 x 16 fp32, for two tiles of 16 rows of A and two of 16 columns
// of B. A panel of packed bf16 pairs is what a tile of B reads: 16 words of k, 16 columns.
//
// An element is summed in steps of 16 words, whatever M and N are: rows are filled up with zeros to whole tiles.
// Floor: 2 M N K flops, of which a tile product does 16,384 in 16 cycles; tiles are loaded once for two products.
#include "gemm_block-inl.h"

#if defined(__AVX512BF16__)
#define TILES __attribute__((target("amx-tile,amx-bf16")))
constexpr i64 kTile = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// C (+)= A B for 32 rows of A (16 with ONE) and 32 columns: `words` is a multiple of 16.
template <bool ONE>
TILES static inline void tiles(const uint32_t* a, i64 a_row, const uint32_t* b, i64 words, float* c, i64 pitch,
                               bool add) {
  const i64 a_bytes = a_row * 4, c_bytes = pitch * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (!ONE) {
      _tile_loadd(2, c + kTile * pitch, c_bytes);
      _tile_loadd(3, c + kTile * pitch + kTile, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (i64 w = 0; w < words; w += kTile) {
    _tile_loadd(6, b + w * kPanel, kPanel * 4);
    _tile_loadd(4, a + w, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + w * kPanel + kTile, kPanel * 4);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (!ONE) {
      _tile_loadd(5, a + kTile * a_row + w, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  if constexpr (!ONE) {
    _tile_stored(2, c + kTile * pitch, c_bytes);
    _tile_stored(3, c + kTile * pitch + kTile, c_bytes);
  }
}

struct AmxBlock : GemmBlock<true> {
  using GemmBlock<true>::GemmBlock;

  // Whole tiles of A, with zeros after its rows and after its words.
  Words tiles_of_a(i64 w0, i64 words, i64 padded) {
    if (direct && rows % kTile == 0 && words == padded) return words_of_a(w0, words);
    const Matrix& x = p.a;
    for (i64 r = 0; r < round_up(rows, kTile); r++)
      for (i64 w = 0; w < padded; w += L) {
        const i64 k = (w0 + w) * 2;
        istore(packed_a + r * kGemmDepth + w,
               r < rows && w < words ? gemm_words<true>(at(x.data, x.dtype, (m0 + r) * x.stride), x.dtype, k, p.K - k)
                                     : iset(0));
      }
    return {packed_a, kGemmDepth, 1};
  }

  TILES void multiply() {
    const i64 panels = (p.n1 - p.n0 + kPanel - 1) / kPanel, tall = round_up(rows, kTile);
    if (p.k0 >= p.k1) __builtin_memset(c, 0, size_t(kGemmRows * pitch) * 4);
    const TileConfig config;
    _tile_loadconfig(&config);
    for (i64 block = 0; p.k0 + block * kGemmDepth < p.k1; block++) {
      const i64 w0 = p.k0 + block * kGemmDepth, words = p.k1 - w0 < kGemmDepth ? p.k1 - w0 : kGemmDepth;
      const i64 padded = round_up(words, kTile);
      const Words a = tiles_of_a(w0, words, padded);
      for (i64 column = c0; column < c1; column += kPanel) {
        const uint32_t* b = p.packed + (block * panels + (column - p.n0) / kPanel) * kGemmDepth * kPanel;
        float* to = c + column - c0;
        i64 r = 0;
        for (; r + 2 * kTile <= tall; r += 2 * kTile)
          tiles<false>(a.data + r * a.row, a.row, b, padded, to + r * pitch, pitch, block > 0);
        if (r < tall) tiles<true>(a.data + r * a.row, a.row, b, padded, to + r * pitch, pitch, block > 0);
      }
    }
    _tile_release();
  }
};
static void gemm_amx(const GemmParams& p, i64 item) { gemm_item<AmxBlock>(p, item); }
#else
constexpr void (*gemm_amx)(const GemmParams&, i64) = nullptr;
#endif

static void fill(Kernels& k) { k.gemm_amx = gemm_amx; }
