// linear_few on CUDA: checks, allocation, launch.
#include "../cuda/linear_few.h"

#include <string>

#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "linear_few";

NormKind norm_of(const std::string& name) {
  GPTFAST_CHECK(name.empty() || name == "layer_norm" || name == "rms_norm", kOp, ": norm is ", name,
                "; expected layer_norm, rms_norm or none");
  return name.empty() ? NormKind::none : name == "layer_norm" ? NormKind::layer : NormKind::rms;
}
Activation activation_of(const std::string& name) {
  const bool known = name.empty() || name == "gelu_tanh" || name == "gelu" || name == "relu_squared";
  GPTFAST_CHECK(known, kOp, ": activation is ", name, "; expected gelu_tanh, gelu, relu_squared or none");
  return name.empty()          ? Activation::none
         : name == "gelu_tanh" ? Activation::gelu_tanh
         : name == "gelu"      ? Activation::gelu
                               : Activation::relu_squared;
}
void check_dtype(const char* name, const Tensor& t, const Tensor& x) {
  GPTFAST_CHECK(t.scalar_type() == x.scalar_type(), kOp, ": ", name, " and x differ in dtype");
}
// Whole chunks of 16 bytes; elsewhere a copy.
bool in_chunks(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
const void* chunks_of(const char* name, const Tensor& t, const Tensor& x, Tensor* owner) {
  check_device(kOp, name, t, x);
  check_dtype(name, t, x);
  *owner = contiguous(kOp, t);
  if (!in_chunks(owner->const_data_ptr())) *owner = torch::stable::clone(*owner);
  return owner->const_data_ptr();
}
Vector chunks_of(const char* name, const OptTensor& t, i64 n, const Tensor& x, Tensor* owner) {
  if (!t) return {nullptr, DType::f32};
  GPTFAST_CHECK(t->numel() == n, kOp, ": ", name, " has ", t->numel(), " values; expected ", n);
  return {chunks_of(name, *t, x, owner), dtype_of(kOp, *t)};
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, std::string norm,
              const OptTensor& norm_weight, const OptTensor& norm_bias, double eps, std::string activation,
              const OptTensor& residual, bool weights_ready) {
  View in = view_of(kOp, x);
  GPTFAST_CHECK(in.dtype != DType::f32, kOp, ": x is float32; expected bfloat16 or float16");
  GPTFAST_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == in.C, kOp,
                ": expected x (M, K) and a weight (N, K)");
  const i64 M = x.size(0), K = in.C, N = weight.size(0);
  LinearFewParams p{};
  p.kind = norm_of(norm), p.activation = activation_of(activation), p.N = int(N);
  GPTFAST_CHECK(
      K && K % 8 == 0 && N <= kMostColumns && M <= kMostLinearRows && staged_values(M, K, p.kind) <= kMostStagedValues,
      kOp, ": ", M, " rows of ", K, " values", p.kind == NormKind::none ? "" : " with a norm", "; expected at most ",
      kMostLinearRows, " rows, K a multiple of 8, and ", kMostStagedValues, " values, of which a norm has 2 K");
  if (in.stride % 8 || !in_chunks(in.owner.const_data_ptr()))
    in.owner = torch::stable::clone(contiguous(kOp, x)), in.stride = K;
  Tensor y = new_tensor(kOp, x, {M, N}, x.scalar_type()), weight_owner, bias_owner, scale_owner, shift_owner;
  if (!y.numel()) return y;
  const Launch on(x);
  p.norm.x = in.rows(), p.norm.R = M, p.norm.C = K, p.norm.eps = epsilon_of(kOp, eps);
  p.norm.weight = chunks_of("norm_weight", norm_weight, K, x, &scale_owner);
  p.norm.bias = chunks_of("norm_bias", norm_bias, K, x, &shift_owner);
  p.weight = chunks_of("weight", weight, x, &weight_owner);
  if (bias) check_dtype("bias", *bias, x);
  p.bias = vector_of(kOp, "bias", bias, N, x, &bias_owner);
  View added{};
  if (residual) {
    added = view_of(kOp, "residual", *residual, x);
    check_dtype("residual", *residual, x);
    GPTFAST_CHECK(residual->dim() == 2 && added.R == M && added.C == N, kOp, ": expected a residual (", M, ", ", N,
                  ")");
    p.residual = added.rows();
  }
  p.y = mut_rows(kOp, y, N);
  const auto as_given = [](const OptTensor& t, const Tensor& owner) {  // a copy is made just now
    return !t || t->const_data_ptr() == owner.const_data_ptr();
  };
  p.weights_ready = weights_ready && as_given(weight, weight_owner) && as_given(norm_weight, scale_owner) &&
                    as_given(norm_bias, shift_owner);
  check(kOp, linear_few(p, on.stream));
  return y;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) { m.impl("linear_few", GPTFAST_BOX(&linear)); }

}  // namespace gptfast::cuda
