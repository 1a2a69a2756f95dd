// y[m][0..32) = x[m] W^T for one panel of packed weights (format.h), in register tiles of R rows x V vectors: what
// the product_*-inl.h share.
//
// With one row the floor is the read of the weights: each line is asked for kAhead bytes before its use. With many rows
// it is arithmetic: V weight vectors are loaded once for R rows, and packed ones are unpacked before, for all rows.
// Sums run over k in order, whatever the tile.
#pragma once
#include "dot-inl.h"
#include "tiles-inl.h"

constexpr int kVectors = int(kPanel / L);
constexpr int kTileVectors = kVectors < 2 ? kVectors : 2;  // with many rows; with one all of the panel

// tile<N>() for the outputs N of a panel in steps of V vectors
template <int V, int N = 0, class Tile> INL void tiles_of_panel(Tile tile) {
  tile.template operator()<N>();
  if constexpr (N + V * L < kPanel) tiles_of_panel<V, N + V * L>(tile);
}
