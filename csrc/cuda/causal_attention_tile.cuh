// What the attention kernels for sm_80 share: which keys a query sees, tiles in shared memory and their fragments,
// dropout bits in fragment order, and the guard against nan in masked keys.
#pragma once
#include <type_traits>

#include "causal_attention.h"
#include "common.cuh"
#include "mma.cuh"
#include "philox.cuh"

namespace gptfast::cuda {

// ---- who sees whom --------------------------------------------------------------------------------------------------

// Positions [lo, hi); none where hi <= lo. For rising queries (keys) both ends of what they see (are seen by) rise too,
// so the first and the last row of a tile bound all of its rows.
struct Range {
  int lo, hi;
  DEV_INLINE void clip(int from, int to) { lo = max(lo, from), hi = min(hi, to); }
  DEV_INLINE bool holds(int x) const { return x >= lo && x < hi; }
};
DEV_INLINE int length_at(const Lengths& x, int n, int most) {
  const i64 v = x.wide ? static_cast<const i64*>(x.data)[n] : static_cast<const int*>(x.data)[n];
  return int(v < 0 ? 0 : v > most ? most : v);
}
// The document of position i: the number of offsets <= i, less one. -1 before the first, `documents` after the last.
DEV_INLINE int document_of(const AttentionParams& p, int i) {
  int below = 0, above = p.documents + 1;
  while (below < above) {
    const int middle = (below + above) / 2;
    if (length_at(p.cu_seqlens, middle, p.S) <= i) below = middle + 1;
    else above = middle;
  }
  return below - 1;
}
DEV_INLINE void clip_to_document(Range& r, const AttentionParams& p, int i) {
  const int d = document_of(p, i);
  if (d < 0) r.clip(0, 0);
  else if (d >= p.documents) r.clip(p.S, p.S);
  else r.clip(length_at(p.cu_seqlens, d, p.S), length_at(p.cu_seqlens, d + 1, p.S));
}
// Keys that query i sees.
DEV_INLINE Range visible_keys(const AttentionParams& p, int b, int i) {
  const int last = i + p.S - p.T;
  Range r{0, p.S};
  if (p.causal) r.clip(0, last + 1);
  if (p.window) r.clip(last - p.window + 1, p.S);
  if (p.seq_lens.data) r.clip(0, length_at(p.seq_lens, b, p.S));
  if (p.cu_seqlens.data) clip_to_document(r, p, i);
  return r;
}
// Queries that see key j.
DEV_INLINE Range visible_queries(const AttentionParams& p, int b, int j) {
  const int first = j - (p.S - p.T);
  Range r{0, p.T};
  if (p.causal) r.clip(first, p.T);
  if (p.window && first + p.window < p.T) r.clip(0, max(first + p.window, 0));
  if (p.cu_seqlens.data) clip_to_document(r, p, j);  // T = S
  if (j >= (p.seq_lens.data ? length_at(p.seq_lens, b, p.S) : p.S)) r.clip(p.T, p.T);
  return r;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Rows of WIDTH values in shared memory, in chunks of 16 bytes that are permuted within a row so that the eight chunks
// of one column of a fragment lie in different banks.
template <class E, int WIDTH> struct Tile {
  static constexpr int kPerChunk = 16 / int(sizeof(E)), kChunks = WIDTH / kPerChunk;
  static constexpr int kRow = kChunks * 16;  // bytes
  static_assert(kChunks >= 4 && WIDTH % kPerChunk == 0);
  char* data;

  DEV_INLINE char* chunk(int row, int n) const {
    const int turn = sizeof(E) == 4 ? (row & 3) << 1 : kChunks == 4 ? row >> 1 & 3 : row & 7;
    return data + (row * kChunks + (n ^ turn)) * 16;
  }
  DEV_INLINE E* at(int row, int column) const {
    return reinterpret_cast<E*>(chunk(row, column / kPerChunk)) + column % kPerChunk;
  }
};

template <class E> DEV_INLINE const E* row_of(const Heads& x, int b, int h, int row) {
  return static_cast<const E*>(x.data) + b * x.sb + h * x.sh + row * x.st;
}
template <class E> DEV_INLINE E* row_of(const MutHeads& x, int b, int h, int row) {
  return static_cast<E*>(x.data) + b * x.sb + h * x.sh + row * x.st;
}

// Starts the copy of rows row0 .. row0 + ROWS - 1 of one head; zeros past `rows` and past column D.
template <int ROWS, int THREADS, class E, int WIDTH>
DEV_INLINE void load_tile(const Tile<E, WIDTH>& tile, const AttentionParams& p, const Heads& x, int b, int h, int row0,
                          int rows) {
  using T = Tile<E, WIDTH>;
  static_assert(THREADS % T::kChunks == 0);
  constexpr int STEP = THREADS / T::kChunks;  // rows from one chunk of a thread to its next
  const int n = int(threadIdx.x) % T::kChunks, column = n * T::kPerChunk;
  const E* from = row_of<E>(x, b, h, row0 + int(threadIdx.x) / T::kChunks) + column;
#pragma unroll 4
  for (int r = int(threadIdx.x) / T::kChunks; r < ROWS; r += STEP, from += STEP * x.st) {
    const bool inside = row0 + r < rows && column < p.D;
    if (p.whole_chunks) {
      cp_async(smem_u32(tile.chunk(r, n)), inside ? from : x.data, inside);
    } else {
      E values[T::kPerChunk];
#pragma unroll
      for (int k = 0; k < T::kPerChunk; k++) values[k] = inside && column + k < p.D ? from[k] : E(0.f);
      memcpy(tile.chunk(r, n), values, 16);
    }
  }
}
// Writes ROWS rows of a tile, `columns` of them from the first one on, to rows row0 … of one head. One warp.
template <int ROWS, class E, int WIDTH>
DEV_INLINE void store_rows(const Tile<E, WIDTH>& tile, int tile_row, const AttentionParams& p, const MutHeads& y, int b,
                           int h, int row0, int rows, int column0) {
  using T = Tile<E, WIDTH>;
  for (int c = int(threadIdx.x % 32); c < ROWS * T::kChunks; c += 32) {
    const int r = c / T::kChunks, n = c % T::kChunks, column = column0 + n * T::kPerChunk;
    if (row0 + r >= rows || column >= p.D) continue;
    E* to = row_of<E>(y, b, h, row0 + r) + column;
    const char* from = tile.chunk(tile_row + r, n);
    if (p.whole_chunks) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int k = 0; k < T::kPerChunk && column + k < p.D; k++) to[k] = reinterpret_cast<const E*>(from)[k];
    }
  }
}

// ---- fragments (layouts: mma.cuh) -----------------------------------------------------------------------------------

// First operand: rows row .. row + 15, columns column .. column + 15.
template <class E, int WIDTH> DEV_INLINE void load_a(uint32_t (&a)[4], const Tile<E, WIDTH>& x, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(a, smem_u32(x.chunk(row + lane % 16, column / 8 + lane / 16)));
}
// Second operands of two products: b[k][n] = x[row + n][column + k], n = 0 .. 15.
template <class E, int WIDTH> DEV_INLINE void load_b(uint32_t (&b)[4], const Tile<E, WIDTH>& x, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4(b, smem_u32(x.chunk(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2)));
}
// Second operands of two products: b[k][n] = x[row + k][column + n], n = 0 .. 15.
template <class E, int WIDTH>
DEV_INLINE void load_b_transposed(uint32_t (&b)[4], const Tile<E, WIDTH>& x, int row, int column) {
  const int lane = threadIdx.x % 32;
  ldmatrix_x4_trans(b, smem_u32(x.chunk(row + lane % 16, column / 8 + lane / 16)));
}
template <int WIDTH> DEV_INLINE void load_a(float2 (&a)[4], const Tile<float, WIDTH>& x, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t2 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = *reinterpret_cast<const float2*>(x.at(row + g + i % 2 * 8, column + t2 + i / 2 * 8));
}
template <int WIDTH> DEV_INLINE void load_b(float2 (&b)[4], const Tile<float, WIDTH>& x, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t2 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; i++)
    b[i] = *reinterpret_cast<const float2*>(x.at(row + g + i / 2 * 8, column + t2 + i % 2 * 8));
}
template <int WIDTH>
DEV_INLINE void load_b_transposed(float2 (&b)[4], const Tile<float, WIDTH>& x, int row, int column) {
  const int g = threadIdx.x % 32 / 4, t2 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = row + t2 + i % 2 * 8, c = column + g + i / 2 * 8;
    b[i] = make_float2(*x.at(r, c), *x.at(r + 1, c));
  }
}
// A result, 16 x 16 of it, as first operand.
template <class E> DEV_INLINE void result_as_a(Pair<E> (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pair<E>(left[0], left[1]), a[1] = pair<E>(left[2], left[3]);
  a[2] = pair<E>(right[0], right[1]), a[3] = pair<E>(right[2], right[3]);
}

// result[m][n] += rows `row` + 16 m … of x times rows `other` + 8 n … of y, over DEPTH columns: x y^T, or with
// TRANSPOSED (y x^T)^T, the same to the bit.
template <class E, int DEPTH, bool TRANSPOSED = false, int MT, int NT, int WIDTH>
DEV_INLINE void multiply_rows(float (&result)[MT][NT][4], const Tile<E, WIDTH>& x, int row, const Tile<E, WIDTH>& y,
                              int other) {
#pragma unroll(DEPTH > 64 ? 1 : 4)  // all of it would keep too many addresses in registers
  for (int k = 0; k < DEPTH; k += 16) {
    Pair<E> a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) load_a(a[m], x, row + 16 * m, k);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      Pair<E> b[4];
      load_b(b, y, other + n * 8, k);
#pragma unroll
      for (int m = 0; m < MT; m++)
        mma<E, TRANSPOSED>(result[m][n], a[m], b), mma<E, TRANSPOSED>(result[m][n + 1], a[m], b + 2);
    }
  }
}
// sum[m][n] += weights[m] times columns column0 + 8 n … of rows `row` … of x: W x.
template <class E, int MT, int NT, int COLUMNS, int WIDTH>
DEV_INLINE void add_weighted(float (&sum)[MT][COLUMNS][4], const float (&weights)[MT][NT][4], const Tile<E, WIDTH>& x,
                             int row, int column0) {
#pragma unroll
  for (int k = 0; k < NT; k += 2) {
    Pair<E> a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) result_as_a<E>(a[m], weights[m][k], weights[m][k + 1]);
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      Pair<E> b[4];
      load_b_transposed(b, x, row + k * 8, column0 + n * 8);
#pragma unroll
      for (int m = 0; m < MT; m++) mma<E>(sum[m][n], a[m], b), mma<E>(sum[m][n + 1], a[m], b + 2);
    }
  }
}
// In fp32 every tile is summed by itself first: three products an element, added to a sum over many keys, would each cost
// a rounding of that sum.
template <class E, int MT, int NT, int COLUMNS, int WIDTH>
DEV_INLINE void add_weighted(float (&sum)[MT][COLUMNS][4], const float (&weights)[MT][NT][4],
                             const Tile<float, WIDTH>& x, int row, int column0) {
#pragma unroll
  for (int n = 0; n < COLUMNS; n += 2) {
    float part[MT][2][4] = {};
#pragma unroll
    for (int k = 0; k < NT; k += 2) {
      float2 b[4];
      load_b_transposed(b, x, row + k * 8, column0 + n * 8);
#pragma unroll
      for (int m = 0; m < MT; m++) {
        float2 a[4];
        result_as_a<float>(a, weights[m][k], weights[m][k + 1]);
        mma<float>(part[m][0], a, b), mma<float>(part[m][1], a, b + 2);
      }
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int e = 0; e < 8; e++) sum[m][n + e / 4][e % 4] += part[m][e / 4][e % 4];
  }
}
// `value` in place of the elements that the warp's rows do not see; columns from j0 on.
template <int MT, int NT> DEV_INLINE void mask(float (&x)[MT][NT][4], const Range* seen, int j0, float value) {
  const int column = j0 + int(threadIdx.x % 4) * 2;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const Range r = seen[16 * m + 8 * half + threadIdx.x % 32 / 4];
      const Range own{r.lo - column, r.hi - column};  // so that all comparisons are with constants
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (!own.holds(n * 8 + e)) x[m][n][2 * half + e] = value;
    }
}
// f(m, n, e) for every element of a lane's results.
template <int MT, int NT, class F> DEV_INLINE void each_element(F f) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(m, n, e);
}
// One warp's 16 MT rows of results times `factor` -> its own rows of a tile.
template <class E, int MT, int NT>
DEV_INLINE void result_to_tile(const float (&x)[MT][NT][4], const float (&factor)[MT][2], const Tile<E, NT * 8>& tile,
                               int tile_row) {
  const int g = threadIdx.x % 32 / 4, t2 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<Pair<E>*>(tile.at(tile_row + 16 * m + 8 * half + g, n * 8 + t2)) =
            pair<E>(x[m][n][2 * half] * factor[m][half], x[m][n][2 * half + 1] * factor[m][half]);
  __syncwarp();
}

// ---- softmax --------------------------------------------------------------------------------------------------------
// exp2(scale s - scale m) is one fused multiply-add and one exp2. Its product scale * m is rounded: for scores of 4e3 that is
// seen in the weights, and from 4e9 on they overflow. So where the product is beyond kFar, the maximum is taken off the
// scores first. Rows seldom are, and a block without such a row pays one comparison for each.

constexpr float kFar = 64.f;  // units of log2

DEV_INLINE float scale_log2_of(const AttentionParams& p) {  // above 0, as 0 times the -inf of masked scores is nan
  return fmaxf(p.scale, 1e-30f) * kLog2e;
}
// What backward needs of a query whose scores have maximum m, and weights relative to it that sum up to `sum`.
DEV_INLINE void store_statistics(const AttentionParams& p, i64 query, float m, float sum) {
  const float top = m * scale_log2_of(p);
  const bool far = fabsf(top) > kFar;
  p.shift[query] = sum != 0.f && far ? m : 0.f;
  p.level[query] = sum == 0.f ? -INFINITY : far ? log2f(sum) : top + log2f(sum);
}

// Scores -> weights, and the running maximum m and sum l of the lane's rows brought up to date, the sum over its own columns
// only. What was summed before must be multiplied by `rescale`.
template <int MT, int NT>
DEV_INLINE void softmax(float (&s)[MT][NT][4], float (&m)[MT][2], float (&l)[MT][2], float (&rescale)[MT][2],
                        float scale_log2) {
  auto seen = [](float top) { return top == -INFINITY ? 0.f : top; };  // 0 for a row that has seen no key yet
  float shift[MT][2];
  bool far = false;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < NT; n++) top = fmaxf(top, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
      top = fmaxf(m[i][h], fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)));
      rescale[i][h] = fast_exp2((m[i][h] - seen(top)) * scale_log2);
      m[i][h] = top;
      shift[i][h] = seen(top) * scale_log2;
      far |= fabsf(shift[i][h]) > kFar;
    }
  if (far) {
    each_element<MT, NT>([&](int i, int n, int e) { s[i][n][e] -= seen(m[i][e / 2]); });
#pragma unroll
    for (int n = 0; n < 2 * MT; n++) shift[n / 2][n % 2] = 0.f;
  }
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          s[i][n][e] = fast_exp2(fmaf(s[i][n][e], scale_log2, -shift[i][h]));
          sum += s[i][n][e];
        }
      l[i][h] = l[i][h] * rescale[i][h] + sum;
    }
}
// Leaves the statistics, and gives what the lane's rows of output must be multiplied by: 0 for a row that saw no key.
template <int MT>
DEV_INLINE void finish_softmax(const float (&m)[MT][2], const float (&l)[MT][2], float (&factor)[MT][2],
                               const AttentionParams& p, int bh, int row) {
  const float kept = p.dropout.threshold ? dropout_scale(p.dropout) : 1.f;
#pragma unroll
  for (int n = 0; n < 2 * MT; n++) {
    float sum = l[n / 2][n % 2];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    factor[n / 2][n % 2] = sum == 0.f ? 0.f : kept / sum;
    if (threadIdx.x % 4 == 0 && row + 8 * n < p.T)
      store_statistics(p, i64(bh) * p.T + row + 8 * n, m[n / 2][n % 2], sum);
  }
}
// Is any of the shifts of a tile's N columns not 0?
template <int N> DEV_INLINE bool any_far(const float* shift) {
  bool far = false;
#pragma unroll
  for (int n = threadIdx.x % 32; n < N; n += 32) far |= shift[n] != 0.f;
  return __any_sync(kAllLanes, far);
}

// ---- dropout --------------------------------------------------------------------------------------------------------

// f(m, n, e, keep) for every element result[m][n][e] of a lane whose first row is `row` of `matrix`; columns from j0
// on, a multiple of 8 NT.
template <int MT, int NT, class F>
DEV_INLINE void each_decision(const Dropout& dropout, int matrix, int row, int j0, F f) {
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < NT; n += 4) {  // the four words of a call serve four tiles of 8 columns
        const int j = j0 + n * 8 + int(threadIdx.x % 4) * 2;
        const uint4 words = dropout_call(dropout, matrix, row + 16 * m + 8 * h, j);
#pragma unroll
        for (int k = 0; k < 4 && n + k < NT; k++) {
          const uint32_t word = word_of(words, NT % 4 ? (j / 8 + k) % 4 : k);
#pragma unroll
          for (int e = 0; e < 2; e++) f(m, n + k, 2 * h + e, dropout_keeps(dropout, word, e));
        }
      }
}
// The same for transposed results: rows are keys from `key` on, a multiple of 16 MT, and columns queries from i0 on. A
// call then serves both lanes of a pair, g and g ^ 1: each makes that of one of their two queries and passes on the
// half of its words that belongs to the other's keys.
template <int MT, int NT, class F>
DEV_INLINE void each_decision_transposed(const Dropout& dropout, int matrix, int key, int i0, F f) {
  const int g = threadIdx.x % 32 / 4, odd = g % 2;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const uint4 words = dropout_call(dropout, matrix, i0 + n * 8 + int(threadIdx.x % 4) * 2 + odd, key + g);
#pragma unroll
    for (int m = 0; m < MT; m++) {
      const int first = MT == 1 ? key / 8 % 4 : 2 * m;
      const uint32_t a = word_of(words, first), b = word_of(words, first + 1);
      const uint32_t low = (a & 0xffff) | b << 16, high = a >> 16 | (b & 0xffff0000);
      const uint32_t own = odd ? high : low, other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
#pragma unroll
      for (int e = 0; e < 4; e++) f(m, n, e, dropout_keeps(dropout, e % 2 == odd ? own : other, e / 2));
    }
  }
}

// ---- nan and inf in masked keys -------------------------------------------------------------------------------------
// A masked weight is 0, and 0 * nan would still be nan. So where a tile with masked elements holds nan or inf, these
// become 0 for the product, and at the end the results of the rows that see them become nan.

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
