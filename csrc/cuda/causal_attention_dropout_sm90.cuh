// Dropout in the attention kernels for Hopper: the decisions of philox.cuh by fewer instructions.
#pragma once
#include "causal_attention_softmax.cuh"
#include "hopper.cuh"
#include "philox.cuh"

namespace gptfast::cuda {

// What the kernels need of a Dropout, made by the host. As parameters of the kernel the keys of the ten rounds are operands of its
// instructions; made on the way they cost two additions a round.
struct HopperDropout {
  uint32_t keys[20];
  uint32_t first_row, first_matrix, offset;
  float kept;      // what kept elements are multiplied by
  uint32_t least;  // the threshold in both halves. 65536 is past 16 bits, but then everything is multiplied by 0
};
inline HopperDropout hopper_dropout(const Dropout& d) {
  HopperDropout h{{}, d.first_row, d.first_matrix, d.offset, 0.f, 0};
  uint32_t low = uint32_t(d.seed), high = uint32_t(d.seed >> 32);
  for (int round = 0; round < 10; round++, low += 0x9E3779B9u, high += 0xBB67AE85u)
    h.keys[2 * round] = low, h.keys[2 * round + 1] = high;
  h.kept = d.threshold < 65536 ? 65536.f / float(65536 - d.threshold) : 0.f;
  h.least = (d.threshold < 65535 ? d.threshold : 65535u) * 0x10001u;
  return h;
}

// The call for columns j + 8 k, j + 8 k + 1 (k < 4) of row i of a matrix; j is even, and j / 8 a multiple of 4.
DEV_INLINE uint4 dropout_call(const HopperDropout& d, int matrix, int i, int j) {
  uint32_t c0 = uint32_t(j) / 8 + uint32_t(j) % 8 / 2, c1 = uint32_t(i) + d.first_row,
           c2 = uint32_t(matrix) + d.first_matrix;
  uint32_t c3 = d.offset;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(b >> 32) ^ c1 ^ d.keys[2 * round], c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ d.keys[2 * round + 1], c3 = uint32_t(a);
  }
  return make_uint4(c0, c1, c2, c3);
}

// f(n, half, low, high) for every pair of neighbouring columns of a lane's results: of rows `row` and `row` + 8, columns from
// j0 on, a multiple of 8 NT. NT is a multiple of 4.
template <int NT, class F> DEV_INLINE void each_pair_kept(const HopperDropout& d, int matrix, int row, int j0, F f) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < NT; n += 4) {
      const uint4 words = dropout_call(d, matrix, row + 8 * half, j0 + n * 8 + int(threadIdx.x % 4) * 2);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        bool low, high;
        halves_at_least(word_of(words, k), d.least, low, high);
        f(n + k, half, low, high);
      }
    }
}

// The 16 words of a tile of 64 columns, for later: as each_pair_kept makes them.
template <int NT>
DEV_INLINE void pair_words(uint32_t (&to)[2 * NT], const HopperDropout& d, int matrix, int row, int j0) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int n = 0; n < NT; n += 4) {
      const uint4 words = dropout_call(d, matrix, row + 8 * half, j0 + n * 8 + int(threadIdx.x % 4) * 2);
#pragma unroll
      for (int k = 0; k < 4; k++) to[half * NT + n + k] = opaque(word_of(words, k));
    }
}

// Where rows are keys, a call of 8 keys and one query would be halved between two warps of 16 keys each. So within 32 keys the
// first warp has those with j % 8 < 4: row r of its 16 is key 8 (r % 4) + 2 (r / 4 % 2) + r / 8, of the second warp's 4 more.
DEV_INLINE int key_of_row(int row) {
  return row / 32 * 32 + row % 4 * 8 + row / 16 % 2 * 4 + row / 4 % 2 * 2 + row / 8 % 2;
}
DEV_INLINE int row_of_key(int key) {
  return key / 32 * 32 + key / 4 % 2 * 16 + key % 2 * 8 + key / 2 % 2 * 4 + key / 8 % 4;
}
// One bit an element of such results with 64 columns, queries from i0 on; key0: the first key of the block, `warp_row` the first
// row of the warp. Four lanes share the calls of four queries: each makes one, and they exchange bytes of decisions.
DEV_INLINE uint32_t decisions_of_keys(const HopperDropout& d, int matrix, int key0, int warp_row, int i0) {
  const int lane = threadIdx.x % 32, x = lane / 4 % 4;
  const int key = key0 + key_of_row(warp_row + lane / 16 * 4), query = i0 + x / 2 * 8 + lane % 4 * 2 + x % 2;
  uint32_t bits = 0;
#pragma unroll
  for (int m = 0; m < 4; m++) {
    const uint4 words = dropout_call(d, matrix, query + 16 * m, key);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      bool low, high;
      halves_at_least(word_of(words, k), d.least, low, high);
      bits |= (low ? 1u << (8 * k + 2 * m) : 0u) | (high ? 2u << (8 * k + 2 * m) : 0u);
    }
  }
  bits = bytes_of(bits, __shfl_xor_sync(kAllLanes, bits, 4), x % 2 ? 0x3715 : 0x6240);
  return opaque(bytes_of(bits, __shfl_xor_sync(kAllLanes, bits, 8), x / 2 ? 0x3276 : 0x5410));
}
DEV_INLINE constexpr int bit_of_key(int n, int e) { return 8 * (2 * (n % 2) + e % 2) + n / 2 * 2 + e / 2; }
// The same for keys in their order: row r of the warp's 16 is key `key` + r. Bit 4 n + e.
template <int NT> DEV_INLINE uint32_t decisions_in_order(const Dropout& d, int matrix, int key, int i0) {
  uint32_t bits = 0;
  each_decision_transposed<1, NT>(d, matrix, key, i0,
                                  [&](int, int n, int e, bool keep) { bits |= uint32_t(keep) << (4 * n + e); });
  return opaque(bits);
}

}  // namespace gptfast::cuda
