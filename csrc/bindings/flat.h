// Pointwise ops whose tensors are contiguous: the shape does not matter.
#pragma once
#include "common.h"

namespace gptfast {

// Cuts the values into rows that share evenly among threads; the last may be short (tail). Strides: of every tensor.
template <class P> void cut_flat(P& p, std::initializer_list<i64*> strides, i64 row = 4096) {
  const i64 n = p.R * p.C;
  if (!n) return;
  p.R = (n + row - 1) / row, p.C = row, p.tail = n - (p.R - 1) * row;
  for (i64* stride : strides) *stride = row;
}

}  // namespace gptfast
