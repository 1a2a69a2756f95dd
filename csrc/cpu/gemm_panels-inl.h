// How gemm's second factor is packed: [block of kGemmDepth words][panel of 32 columns][strip of a panel][word][kStrip].
//
// A strip has the columns of one register tile, so that what a tile reads fills its cache lines and all sets of L1. With
// strips of 16 in rows of 32 columns (AVX2) every second line was read: 16 KB in half of the sets, which left no room for
// A, and products took 1.07 to 1.4 times as long (Zen 3).
#pragma once

constexpr i64 kPanel = kGemmPanel;
constexpr i64 kStrip = L == 16 || kScalar ? kPanel : 16;

// From the start of a panel in a block, the place of a word; columns from kPanel on are those of the next panels.
INL i64 packed_place(i64 word, i64 column) {
  const i64 strip = column / kStrip;
  return (strip * kGemmDepth + word) * kStrip + column % kStrip;
}
