// linear_few as the bindings see it; semantics: see gptfast/ops/_linear_few.py. Conventions as in kernels.h.
#pragma once
#include "kernels.h"

namespace gptfast::cuda {

enum class NormKind : int { none, layer, rms };
enum class Activation : int { none, gelu_tanh, gelu, relu_squared };

// y = activation(norm(x) W^T + bias) + residual in 16 bits. All tensors are of x's dtype. Rows of x and of the weight, and the
// norm's weight and bias, begin at multiples of 16 bytes; K is a multiple of 8.
struct LinearFewParams {
  LayerNormParams norm;  // of it x, weight, bias, R = M rows, C = K columns, eps
  NormKind kind;
  const void* weight;  // (N, K)
  Vector bias;         // (N), or null
  Rows residual;       // (M, N), or null
  MutRows y;           // (M, N)
  int N;
  Activation activation;
  bool weights_ready;  // no kernel that may still run writes weight, bias or those of the norm
};

// Rows of K values that a block keeps in shared memory: x, and the norm's weight and bias.
inline i64 staged_values(i64 M, i64 K, NormKind kind) { return (M + (kind == NormKind::none ? 0 : 2)) * K; }
constexpr i64 kMostLinearRows = 8, kMostStagedValues = 28 << 10;

cudaError_t linear_few(const LinearFewParams&, cudaStream_t);

}  // namespace gptfast::cuda
