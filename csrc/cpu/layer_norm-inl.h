// LayerNorm (Ba et al., arXiv 1607.06450) and RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over rows, alone or after dropout
// and a residual sum, forward and backward. RMSNorm (p.mean null) is LayerNorm with a mean of 0 whose gradient takes no part.
//
//   total = dropout(x) + residual                                      (add_layer_norm only)
//   y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps), var the biased variance, in two passes (moments)
//   dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
//   dweight = sum_rows dy xhat,  dbias = sum_rows dy   (per chunk of rows, added in chunk order)
//
// Floor: one read and one write forward (with a residual two and two), two reads and one write backward (three and one
// or two); a row of up to some thousand values stays in L1 over its passes.

#pragma once
#include "dropout_lanes-inl.h"

// What this thread keeps beside the rows: weight and bias as fp32, and the dropout decisions of a row.
struct NormBuffers {
  float *weight, *bias, *wide[3];  // wide: rows of 16 bits as fp32
  uint16_t* lanes;
  void* total;  // the row that is normalised, where p.total goes past the caches
  explicit NormBuffers(const LayerNormParams& p) {
    const i64 n = round_up(p.C + L, 16), n_lanes = round_up(p.C, 8 * L);
    weight = static_cast<float*>(scratch(size_t(6 * n) * 4 + size_t(n_lanes) * 2));
    bias = weight + n;
    total = bias + n;
    for (int i = 0; i < 3; i++) wide[i] = bias + (2 + i) * n;
    lanes = reinterpret_cast<uint16_t*>(bias + 5 * n);
    if (p.weight.data) copy_row(weight, p.weight.data, p.weight.dtype, p.C);
    else
      for (i64 c = 0; c < p.C; c++) weight[c] = 1.f;
    if (p.bias.data) copy_row(bias, p.bias.data, p.bias.dtype, p.C);
    else __builtin_memset(bias, 0, size_t(p.C) * 4);
  }
};

// Row r + 1, to be asked for while row r is computed: rows from memory cost a fifth less so. nullptr stays nullptr.
INL const char* next_row(const LayerNormParams& p, const Rows& x, i64 r) {
  return static_cast<const char*>(x.data ? row(x, r + 1 < p.R ? r + 1 : r) : nullptr);
}

// put_as of any dtype.
INL void put_any(bool past, void* row, DType type, i64 c, F x, i64 n) {
  with_dtype(type, [&](auto t) __attribute__((always_inline)) { put_as<t.value>(past, row, c, x, n); });
}
