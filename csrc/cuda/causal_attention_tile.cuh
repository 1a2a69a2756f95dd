// Tiles of attention in shared memory, their fragments, and products of them, for the kernels for sm_80.
#pragma once
#include <type_traits>

#include "causal_attention.h"
#include "causal_attention_visible.cuh"
#include "common.cuh"
#include "mma.cuh"

namespace gptfast::cuda {

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

// N chunks of eight values as they lie in memory, all of them asked for before one is used: from column(n) of row(n), zeros past
// D and where there is no such row.
template <class E, int N, class Row, class Column, class Inside>
DEV_INLINE void load_chunks(Raw<E, 8> (&to)[N], const AttentionParams& p, Row row, Column column, Inside inside) {
  if (p.whole_chunks && p.D % 8 == 0) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      to[n].zero();
      if (inside(n) && column(n) < p.D) to[n].load(row(n) + column(n));
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    E values[8];
#pragma unroll
    for (int k = 0; k < 8; k++)
      from_float(values[k], inside(n) && column(n) + k < p.D ? to_float(row(n)[column(n) + k]) : 0.f);
    memcpy(to[n].words, values, sizeof values);
  }
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

}  // namespace gptfast::cuda
