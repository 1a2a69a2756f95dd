// Products of tiles for the kernels of this instruction set: those of tile-inl.h, called through the table.
#pragma once
#include "tile_words-inl.h"

#ifdef GPTFAST_TILES
constexpr bool kTiles = true;  // of AMX: products of pairs read A by rows, and keep registers until end_products()
#else
constexpr bool kTiles = false;
#endif

static const Kernels* own_table;  // fill() of a kernel that calls `product` sets it

template <bool PAIR> INL void product(const TileProduct& p) {
  (PAIR ? own_table->tile_product_pairs : own_table->tile_product)(p);
}
INL void end_products() {
  if constexpr (kTiles) own_table->tiles_end();
}
