// What the pointwise ops share: rows cut into vectors, and the shape of a launch.
#pragma once
#include "common.cuh"

namespace gptfast::cuda {

constexpr int kThreads = 256;

// One row at columns c .. c + V - 1 that exist: f(width, column) with the full width, or value by value at a ragged end.
template <int V, class F> DEV_INLINE void for_columns(i64 c, i64 columns, F f) {
  if (c + V <= columns) f(Width<V>{}, c);
  else
    for (i64 k = c; k < columns; k++) f(Width<1>{}, k);
}

// Threads along the columns first, so many that blocks of them end near the last column (192 and 192 for 384, not 256 and
// 128); what is left of a block takes further rows. A thread has `each` rows, or more where the grid ends.
struct Shape {
  dim3 grid, block;
};
template <int V> Shape shape_of(i64 C, i64 rows, int each) {
  const i64 vectors = ceil_div(C, V), blocks = ceil_div(vectors, kThreads);
  const int x = round_to_warps(ceil_div(vectors, blocks), kThreads), y = kThreads / x;
  const i64 down = ceil_div(rows, y * each);
  return {dim3(unsigned(blocks), unsigned(down < 65535 ? down : 65535)), dim3(x, y)};
}

}  // namespace gptfast::cuda
