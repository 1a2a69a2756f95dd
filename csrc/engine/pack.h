// Packing of weights into the layout of format.h.
#pragma once
#include "format.h"

namespace gptfast::engine {

// Panels [first, last) of W (N, K) / factor, a power of two, into `matrix`, the begin of the whole packed matrix. W is fp32,
// its rows ld apart. Quantised formats choose each group's scale for the least squared error. The result is the same on
// every machine.
void pack(Format format, const float* W, i64 ld, i64 N, i64 K, float factor, i64 first, i64 last, char* matrix);

uint16_t to_bf16(float x);  // rounded to nearest, ties to even

}  // namespace gptfast::engine
