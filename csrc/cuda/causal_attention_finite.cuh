// The guard of attention against nan and inf in masked keys.
//
// A masked weight is 0, and 0 * nan would still be nan. So where a tile with masked elements holds nan or inf, these
// become 0 for the product, and at the end the results of the rows that see them become nan.
#pragma once
#include "causal_attention_tile.cuh"

namespace gptfast::cuda {

DEV_INLINE bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// All bits of the values of a 32-bit word that are nan or inf, whose exponent is all ones: one added to that carries into the
// bit of the sign.
template <class E> DEV_INLINE uint32_t nonfinite_bits(uint32_t word) {
  constexpr uint32_t exponent = sizeof(E) == 4 ? 0x7f800000u : std::is_same_v<E, __half> ? 0x7c007c00u : 0x7f807f80u;
  constexpr uint32_t least = exponent & ~(exponent << 1), sign = sizeof(E) == 4 ? 0x80000000u : 0x80008000u;
  const uint32_t found = ((word & exponent) + least) & sign;
  return found | (found - (found >> (sizeof(E) * 8 - 1)));
}
// Puts 0 in place of nan and inf in ROWS rows of a tile; tells whether this thread, number `thread` of THREADS, found any.
template <int ROWS, int THREADS, class E, int WIDTH>
DEV_INLINE bool remove_nonfinite(const Tile<E, WIDTH>& tile, int thread) {
  using T = Tile<E, WIDTH>;
  auto chunk = [&](int c) { return reinterpret_cast<uint4*>(tile.data + c * 16); };
  uint32_t found = 0;
#pragma unroll(sizeof(E) == 4 ? 1 : 4)  // fp32 has no registers for more at head dim 256
  for (int c = thread; c < ROWS * T::kChunks; c += THREADS) {
    const uint4 x = *chunk(c);
    found |= nonfinite_bits<E>(x.x) | nonfinite_bits<E>(x.y) | nonfinite_bits<E>(x.z) | nonfinite_bits<E>(x.w);
  }
  if (!found) return false;
#pragma unroll 1
  for (int c = thread; c < ROWS * T::kChunks; c += THREADS) {
    uint4 x = *chunk(c);
    x.x &= ~nonfinite_bits<E>(x.x), x.y &= ~nonfinite_bits<E>(x.y);
    x.z &= ~nonfinite_bits<E>(x.z), x.w &= ~nonfinite_bits<E>(x.w);
    *chunk(c) = x;
  }
  return true;
}
// Did any thread find something? All threads that `barrier` joins call, WARPS warps of which the caller's is number `warp`;
// `flags` is shared memory for one int a warp.
template <int WARPS, class Barrier> DEV_INLINE bool any_found(bool found, int warp, int* flags, Barrier barrier) {
  found = __any_sync(kAllLanes, found);
  if (threadIdx.x % 32 == 0) flags[warp] = found;
  barrier();
  found = false;
#pragma unroll
  for (int w = 0; w < WARPS; w++) found |= flags[w] != 0;
  return found;
}
// One warp's rows of results, whose first column is column0, become nan where they see nan or inf in x (keys or values) in
// memory: slow, and rare.
template <int ROWS, class E, int WIDTH>
DEV_INLINE void spread_nonfinite(const Tile<E, WIDTH>& results, int tile_row, const Range* seen,
                                 const AttentionParams& p, const Heads& x, int b, int h, int column0) {
  const int columns = min(WIDTH, p.D - column0);
  for (int r = 0; r < ROWS; r++)
    for (int c = threadIdx.x % 32; c < columns; c += 32) {
      bool bad = false;
      for (int j = seen[r].lo; j < seen[r].hi; j++) bad |= !finite(to_float(row_of<E>(x, b, h, j)[column0 + c]));
      if (bad) *results.at(tile_row + r, c) = E(NAN);
    }
  __syncwarp();
}

}  // namespace gptfast::cuda
