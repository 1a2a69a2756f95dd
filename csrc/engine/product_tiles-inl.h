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

// The first output of a tile where it is a constant, with code for each; else it is an int.
template <int N> struct Output {
  constexpr operator int() const { return N; }
};
constexpr bool kOneBody = kScalar;  // one code for the tiles of a panel: their addresses take registers

// tile(n) for the outputs n of a panel in steps of V vectors
template <int V, bool ONE_BODY = kOneBody, int N = 0, class Tile> INL void tiles_of_panel(Tile tile) {
  if constexpr (ONE_BODY && V * L < kPanel) {
    for (int n = 0; n < kPanel; n += V * L) {
      asm("" : "+r"(n));
      tile(n);
    }
  } else {
    tile(Output<N>());
    if constexpr (N + V * L < kPanel) tiles_of_panel<V, ONE_BODY, N + V * L>(tile);
  }
}
