// quantized_linear as the bindings see it; semantics: see gptfast/ops/quantized_linear.py. Conventions as in kernels.h.
#pragma once
#include "kernels.h"

namespace gptfast::cuda {

enum class Codes : int { int8, int4, nf4, mxfp4 };

// W[n, k] = scales[n, k / group] * value of code [n, k]. A row of codes is whole groups; its bytes and its address are
// multiples of 16.
struct PackedWeight {
  const uint8_t* codes;  // (N, row_bytes)
  const void* scales;  // (N, groups); of mxfp4 bytes, 127 more than the exponent of a power of two, whatever dtype says
  DType scale_dtype;
  Codes format;
  int N, K, groups, group_shift;  // groups of 2^group_shift values
  i64 row_bytes;
};

// y = x W^T + bias, or with `transposed` y = x W.
struct QuantizedLinearParams {
  Rows x;  // (M, K), or (M, N) if transposed: rows at multiples of 16 bytes, zeros up to row_columns(p)
  PackedWeight w;
  Vector bias;  // not with transposed
  MutRows y;    // of x's dtype
  int M;
  bool transposed;
};
// As many columns as a row of x must have in memory: whole groups, or whole 16 bytes.
inline i64 row_columns(const PackedWeight& w, bool transposed) {
  return transposed ? (i64(w.N) + 7) / 8 * 8 : i64(w.groups) << w.group_shift;
}

cudaError_t quantized_linear(const QuantizedLinearParams&, cudaStream_t);

// Its parts, each for the calls that it takes on.
bool quantized_linear_few_takes(const QuantizedLinearParams&);
cudaError_t quantized_linear_few(const QuantizedLinearParams&, cudaStream_t);
bool quantized_linear_sm90_takes(const QuantizedLinearParams&);
// cudaErrorNotSupported where the driver makes no TMA map: the one for sm_80 then does it.
cudaError_t quantized_linear_sm90(const QuantizedLinearParams&, cudaStream_t);  // 16 bits, any rows, on Hopper
cudaError_t quantized_linear_sm80(const QuantizedLinearParams&, cudaStream_t);  // 16 bits, any rows
cudaError_t quantized_linear_fp32(const QuantizedLinearParams&, cudaStream_t);  // fp32, any rows

}  // namespace gptfast::cuda
