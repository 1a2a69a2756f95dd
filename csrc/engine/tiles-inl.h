// Prefetching, and rows in tiles: what the kernels of the engine share.
#pragma once

constexpr i64 kAhead = 8192;  // bytes; measured: +23% for 4-bit weights over none, 512 does harm

INL void prefetch_range(const char* w, i64 bytes) {
  for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(w + i, 0, 3);
}

// M rows in tiles of ROWS, and one of what is left.
template <int R, class Tile> INL void last_rows(i64 m, i64 left, Tile tile) {
  if constexpr (R > 0) {
    if (left == R) return tile.template operator()<R>(m);
    last_rows<R - 1>(m, left, tile);
  }
}
template <int ROWS, class Tile> INL void rows_of_tiles(i64 M, Tile tile) {
  i64 m = 0;
  for (; m + ROWS <= M; m += ROWS) tile.template operator()<ROWS>(m);
  last_rows<ROWS - 1>(m, M - m, tile);
}
