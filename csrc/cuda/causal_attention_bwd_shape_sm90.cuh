// Backward of causal_attention on Hopper, head dims up to 128 in 16 bits: the two kernels of causal_attention_bwd.cuh,
// which has the formulas, by TMA and wgmma. Each sums in one fixed order without atomics.
//
// A block keeps BM rows of one pair of tensors and meets all tiles of BN rows of the other pair:
//
//                  kept (a0, a1)   met (b0, b1)   s = a0 b0^T   dp = a1 b1^T   sums
//   query gradient     q, dout         k, v          scores          dP        dq += dS b0
//   key gradients      k, v            q, dout       transposed      transposed   dk += dS b0, dv += P b1
//
// The kernel of dq runs first and forms delta. Warpgroup 0 loads; every other has 64 of the rows kept. The products of a
// tile's sums run on while the next tile's scores are formed. Barriers in shared memory: the rows kept have landed; of each
// stage, the tiles have landed and have been used.
#pragma once
#include "causal_attention_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class E_, int D_, bool KEYS_> struct BackwardShape90 {
  using E = E_;
  static constexpr bool KEYS = KEYS_;
  static constexpr int D = D_, CONSUMERS = 2, BM = 64 * CONSUMERS, BN = 64, STAGES = 4, WARPS = 4 * CONSUMERS;
  static constexpr int THREADS = 128 * (CONSUMERS + 1), KEPT_BYTES = BM * D * 2, TILE_BYTES = BN * D * 2;
  // The rows kept as first operands in registers: read from shared memory for every tile, they and the tile would take all that
  // it can give beside products of 64 columns.
  static constexpr bool IN_REGISTERS = D == 64;
  static constexpr bool GROUPS = KEYS && D == 64;     // at head dim 128 no register is left to count heads
  static constexpr bool AHEAD = !(KEYS && D == 128);  // sums of a tile under the exponentials of the next one
  // Tiles asked for before the block's warps meet for the first time: they wait for it. With one, dk and dv spill.
  static constexpr int AT_FIRST = KEYS ? 2 : 1;
  static constexpr int BARRIERS = 1 + 2 * STAGES;
  static constexpr int SMEM = 2 * KEPT_BYTES + 2 * STAGES * TILE_BYTES + BARRIERS * 8 + BM * int(sizeof(Range)) +
                              3 * STAGES * BN * int(sizeof(float)) + (STAGES + 2 * WARPS) * int(sizeof(int)) +
                              32 * WARPS * int(sizeof(float));
};
// What is kept of a tile. Made while the products run: of queries the random words, of keys, where registers are few, a bit
// an element.
template <bool KEYS, int NT> struct BackwardDecisions {
  static_assert(4 * NT <= 32);
  uint32_t words[KEYS ? 1 : 2 * NT];
};
struct BackwardMaps {
  CUtensorMap a0, a1, b0, b1;
};

}  // namespace
}  // namespace gptfast::cuda
