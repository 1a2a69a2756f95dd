// A decoding step's new position in a cache of keys and values, as the bindings see it. Conventions as in kernels.h.
#pragma once
#include "causal_attention.h"

namespace gptfast::cuda {

struct NewPosition {
  Heads k, v;             // (B, heads, 1, D)
  MutHeads keys, values;  // (B, heads, S, D), of k's dtype
  const i64* lengths;     // (B): the position; of a row where it lies outside of [0, S) nothing is stored
  i64* seen;              // (B): written, the keys that there are then: lengths + 1, at least 0, at most S
  i64 B, heads, S, D;
  DType dtype;
};
cudaError_t append_position(const NewPosition&, cudaStream_t);

}  // namespace gptfast::cuda
