// The products of pairs of bf16 of tile-inl.h on AMX's tiles, for A by rows (ka == 1).
//
// Sums: 16 words of k at a time, even and odd values along k apart, then their two sums together, then that to C; numbers
// below 2^-126 count as 0 (Intel's description of tdpbf16ps). So the bits are not those of vdpbf16ps, but they depend on K alone:
// a row of C on no other row, and not on how many there are. A step is summed by itself, so TileOp::add is `accumulate`.
//
// Floor: a tile product does 16,384 flops, in 16 cycles on the first such processors; with 32 rows and 32 columns a tile is loaded
// for each.
#include "products-inl.h"
#include "tiles-inl.h"

static thread_local Tiles tiles_in_use;

// 16 R rows from r on, or fewer where the tiles are configured for that, and V vectors from v on: words [w, w + steps * words).
struct TileStretch {
  i64 w, steps, words;
  bool add;
};
template <int R, int V> INL void tile_block(const TileProduct& p, i64 r, i64 v, const TileStretch& k) {
  const uint32_t *a = p.A + r * p.ra + k.w, *b = p.B + k.w * p.ldb + v * L;
  float* c = p.C + r * p.ldc + v * L;
  tiles_begin<R, V>(c, p.ldc * 4, k.add);
  for (i64 s = 0; s < k.steps; s++, a += kTile, b += kTile * p.ldb) tiles_step<R, V>(a, p.ra * 4, b, p.ldb * 4);
  tiles_end<R, V>(c, p.ldc * 4);
}
template <int V> INL void tile_rows(const TileProduct& p, i64 v, const TileStretch& k) {
  i64 r = 0;
  if (p.M >= kTile) tiles_in_use.use(kTile, k.words);
  for (; r + 2 * kTile <= p.M; r += 2 * kTile) tile_block<2, V>(p, r, v, k);
  for (; r + kTile <= p.M; r += kTile) tile_block<1, V>(p, r, v, k);
  if (r == p.M) return;
  tiles_in_use.use(p.M - r, k.words);
  tile_block<1, V>(p, r, v, k);
}
static void tile_stretch(const TileProduct& p, const TileStretch& k) {
  i64 v = 0;
  for (; v + 2 <= p.vectors; v += 2) tile_rows<2>(p, v, k);
  if (v < p.vectors) tile_rows<1>(p, v, k);
}
static void tile_product_pairs(const TileProduct& p) {
  if (p.op == TileOp::scale)
    for (i64 r = 0; r < p.M; r++)
      for (int v = 0; v < p.vectors; v++)
        store(p.C + r * p.ldc + v * L, load(p.C + r * p.ldc + v * L) * load(p.alpha + v * L));
  const i64 steps = p.K / kTile, rest = p.K % kTile;
  if (steps || !rest) tile_stretch(p, {0, steps, kTile, p.op != TileOp::set});
  if (rest) tile_stretch(p, {steps * kTile, 1, rest, steps || p.op != TileOp::set});
}
static void tiles_end() { tiles_in_use.end(); }

static void fill(Kernels& k) {
  k.tile_product_pairs = tile_product_pairs;
  k.tiles_end = tiles_end;
}
