// Dropout along rows by the Philox contract (gptfast/rng.py): element (m, i, j) is kept when its 16-bit lane of the call
// with counter (c0(j), i, m, offset) is >= threshold, and scaled by 65536 / (65536 - threshold).
//
// Call k = c0 serves columns 32 (k >> 2) + 8 w + 2 (k & 3) + {0, 1} in the halves of its word w. L calls run at once, one
// a lane; storing 4 lanes (k & 3) of each word side by side puts the 16-bit decisions in column order.
//
// Floor: one read and one write; a Philox call of L lanes (about 60 vector operations) serves 8 L columns.

#include "dropout_lanes-inl.h"

constexpr i64 kDropoutBlock = 2048;  // columns at a time: a multiple of 8 * L, within L1

static void dropout(const DropoutRowsParams& p, i64 row_begin, i64 row_end) {
  alignas(64) float xs[kDropoutBlock], ys[kDropoutBlock];
  alignas(64) uint16_t lanes[kDropoutBlock] = {};  // at threshold 0 these decisions stand: everything is kept
  const float scale = dropout_scale(p.dropout);
  for (i64 r = row_begin; r < row_end; r++)
    for (i64 c0 = 0; c0 < p.C; c0 += kDropoutBlock) {
      const i64 width = p.C - c0 < kDropoutBlock ? p.C - c0 : kDropoutBlock;
      const float* x = read_row(at(row(p.x, r), p.x.dtype, c0), p.x.dtype, width, xs);
      void* out = at(row(p.y, r), p.y.dtype, c0);
      float* y = write_row(out, p.y.dtype, ys);
      if (p.dropout.threshold) dropout_lanes(lanes, p.dropout, 0, r, c0, width);
      for_lanes(width, [&](i64 c, i64 n) __attribute__((always_inline)) {
        store_lanes(y + c, drop(load_lanes(x + c, n), lanes + c, p.dropout.threshold, scale), n);
      });
      finish_row(out, p.y.dtype, y, width);
    }
}

static void dropout_mask(const DropoutMaskParams& p, i64 row_begin, i64 row_end) {
  alignas(64) uint16_t lanes[kDropoutBlock];
  for (i64 r = row_begin; r < row_end; r++)
    for (i64 c0 = 0; c0 < p.C; c0 += kDropoutBlock) {
      const i64 width = p.C - c0 < kDropoutBlock ? p.C - c0 : kDropoutBlock;
      dropout_lanes(lanes, p.dropout, r / p.rows, r % p.rows, c0, width);
      for (i64 c = 0; c < width; c++) p.keep[r * p.C + c0 + c] = lanes[c] >= p.dropout.threshold;
    }
}

static void fill(Kernels& k) {
  k.dropout = dropout;
  k.dropout_mask = dropout_mask;
}
