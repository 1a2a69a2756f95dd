// The tile of tile-inl.h for pairs of bf16 on BF16's matrix product: bfmmla multiplies 2 rows of 4 values by 4 values
// of 2 columns, twice as many as bfdot, and sums them in the same order, to the same bits (with FPCR.EBF 0, as it is).
//
// A sum is a square: rows r and r + 1, columns c and c + 1. B's words of two steps along k, zipped, are its factor; A's come
// from two rows as they lie. One of A's strides is 1.
#pragma once

INL uint32x2_t two_words(const uint32_t* p) {
  return vreinterpret_u32_u8(vld1_u8(reinterpret_cast<const uint8_t*>(p)));
}
// Words k and k + 1 of two rows of A: rows of neighbouring words (BY_ROWS), `stride` apart, or words of neighbouring rows.
template <bool BY_ROWS> INL I words_of_rows(const uint32_t* a, i64 stride) {
  const uint32x2_t first = two_words(a), second = two_words(a + stride);
  if (BY_ROWS) return vcombine_u32(first, second);
  const uint32x2x2_t both = vzip_u32(first, second);
  return vcombine_u32(both.val[0], both.val[1]);
}
INL F multiply_matrices(F acc, I a, I b) {
  return vbfmmlaq_f32(acc, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}

// Squares (r, c), (r, c + 2) <-> rows r and r + 1 of columns c to c + 3: the same exchange both ways.
INL void exchange_halves(F* a, F* b) {
  const I first = zip_low64(as_int(*a), as_int(*b)), second = zip_high64(as_int(*a), as_int(*b));
  *a = as_float(first);
  *b = as_float(second);
}

template <int R, int V, class Op>
INL void matrix_tile(Op op, const uint32_t* A, i64 ra, i64 ka, const uint32_t* B, i64 ldb, i64 K, float* C, i64 ldc,
                     const float* alpha) {
  static_assert(R % 2 == 0);
  constexpr int P = R / 2;
  F acc[R][V];  // row 2 p: the squares of columns c, row 2 p + 1: those of columns c + 2
  tile_begin<R, V>(op, acc, C, ldc, alpha);
  if (op == TileOp::accumulate || op == TileOp::scale)
    UNROLL_FOR (int p = 0; p < P; p++)
      UNROLL_FOR (int v = 0; v < V; v++) exchange_halves(&acc[2 * p][v], &acc[2 * p + 1][v]);
  const auto step = [&](const I(&a)[P], const uint32_t* first, const uint32_t* second) __attribute__((always_inline)) {
    UNROLL_FOR (int v = 0; v < V; v++) {
      const I b0 = iload(first + v * L), b1 = second ? iload(second + v * L) : iset(0);
      const I low = vzip1q_u32(b0, b1), high = vzip2q_u32(b0, b1);
      UNROLL_FOR (int p = 0; p < P; p++) {
        acc[2 * p][v] = multiply_matrices(acc[2 * p][v], a[p], low);
        acc[2 * p + 1][v] = multiply_matrices(acc[2 * p + 1][v], a[p], high);
      }
    }
  };
  i64 k = 0;
  I a[P];
  if (ka == 1) {
    for (; k + 2 <= K; k += 2) {
      UNROLL_FOR (int p = 0; p < P; p++) a[p] = words_of_rows<true>(A + 2 * p * ra + k, ra);
      step(a, B + k * ldb, B + (k + 1) * ldb);
    }
  } else {
    for (; k + 2 <= K; k += 2) {
      UNROLL_FOR (int p = 0; p < P; p++) a[p] = words_of_rows<false>(A + 2 * p + k * ka, ka);
      step(a, B + k * ldb, B + (k + 1) * ldb);
    }
  }
  if (k < K) {  // a last word alone: the other counts as 0
    UNROLL_FOR (int p = 0; p < P; p++) {
      uint32_t words[4] = {};
      __builtin_memcpy(words, A + 2 * p * ra + k * ka, 4);
      __builtin_memcpy(words + 2, A + (2 * p + 1) * ra + k * ka, 4);
      a[p] = iload(words);
    }
    step(a, B + k * ldb, nullptr);
  }
  UNROLL_FOR (int p = 0; p < P; p++)
    UNROLL_FOR (int v = 0; v < V; v++) exchange_halves(&acc[2 * p][v], &acc[2 * p + 1][v]);
  tile_end<R, V>(op, acc, C, ldc);
}
