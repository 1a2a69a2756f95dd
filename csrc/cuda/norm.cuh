// What both directions of the norms share.
#pragma once
#include <type_traits>

#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {

// The weight at columns c .. c + V - 1; RMSNorm may have none.
template <bool CENTERED, int V> DEV_INLINE void load_weight(float (&weight)[V], const LayerNormParams& p, int c) {
  if constexpr (!CENTERED) {
    if (!p.weight.data) {
#pragma unroll
      for (int k = 0; k < V; k++) weight[k] = 1.f;
      return;
    }
  }
  load_any(weight, p.weight.data, p.weight.dtype, c);
}

}  // namespace gptfast::cuda
