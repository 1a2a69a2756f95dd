// Products of tiles of bf16 pairs, where the CPU multiplies these; see tile-inl.h.
#include "tile-inl.h"

static void fill(Kernels& k) {
  if constexpr (kPairs) k.tile_product_pairs = tile_product<kPairs>;
  else k.tile_product_pairs = nullptr;
}
