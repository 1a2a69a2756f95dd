// The product with one panel of a weight matrix, for any number of rows.
#pragma once
#include "kernels.h"

namespace gptfast::engine {

// Of one panel; with many rows one of few bits becomes one of int8 first.
inline void panel_product(const Kernels& k, Format f, const char* panel, const Activations& x, i64 rows, i64 K,
                          float* y, i64 ldy) {
  if (k.unpack[int(f)] && rows >= kUnpackedRows) {
    char* bytes = static_cast<char*>(cpu::scratch(size_t(panel_bytes(Format::int8, K))));
    k.unpack[int(f)](panel, K, bytes);
    Activations read = x;
    read.offset = weight_offset(f);
    return k.product[int(Format::int8)](bytes, read, rows, K, y, ldy);
  }
  k.product[int(f)](panel, x, rows, K, y, ldy);
}

}  // namespace gptfast::engine
