// Pointwise ops whose tensors are contiguous: the shape does not matter.
#pragma once
#include "common.h"

namespace gptfast {

// Cuts the values into rows that share evenly among threads; the last may be short (tail). Strides: of every tensor.
template <class P> void cut_flat(P& p, std::initializer_list<i64*> strides) {
  constexpr i64 kRow = 4096;
  const i64 n = p.R * p.C;
  if (!n) return;
  p.R = (n + kRow - 1) / kRow, p.C = kRow, p.tail = n - (p.R - 1) * kRow;
  for (i64* stride : strides) *stride = kRow;
}

}  // namespace gptfast
