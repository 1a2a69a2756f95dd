// Products of tiles of fp32; see tile-inl.h.
#include "tile-inl.h"

static void fill(Kernels& k) { k.tile_product = tile_product<false>; }
