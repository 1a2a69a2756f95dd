// What the norms share on CUDA: layer_norm, add_layer_norm, rms_norm and add_rms_norm are one kernel.
#pragma once
#include "cuda_common.h"

namespace gptfast::cuda {

using NormLauncher = cudaError_t (*)(const LayerNormParams&, cudaStream_t);

struct NormResults {
  Tensor y, total, mean, rstd;  // total: undefined without a residual; mean: undefined for RMSNorm
};
struct NormOptions {
  double eps;
  i64 y_type;
  bool centered;  // LayerNorm, which subtracts the mean
  Dropout dropout{};
};
inline NormResults norm_fwd(const char* op, NormLauncher launch, const Tensor& x, const OptTensor& residual,
                            const OptTensor& weight, const OptTensor& bias, const NormOptions& o) {
  const View v = view_of(op, x), r = residual ? view_of(op, "residual", *residual, x) : v;
  GPTFAST_CHECK(r.R == v.R && r.C == v.C, op, ": x and residual differ in shape");
  const Launch on(x);
  NormResults out;
  Tensor weight_owner, bias_owner;
  LayerNormParams p{};
  if (residual) {
    const bool same = x.scalar_type() == residual->scalar_type();
    out.total = new_like(op, x, same ? x.scalar_type() : ScalarType::Float);
    p.residual = r.rows(), p.total = mut_rows(op, out.total, v.C);
  }
  out.y = new_like(op, x, dtype_of_code(op, o.y_type)), out.rstd = new_tensor(op, x, {v.R}, ScalarType::Float);
  p.x = v.rows(), p.y = mut_rows(op, out.y, v.C), p.R = v.R, p.C = v.C;
  p.eps = epsilon_of(op, o.eps), p.dropout = o.dropout;
  p.weight = vector_of(op, "weight", weight, v.C, x, &weight_owner);
  p.bias = vector_of(op, "bias", bias, v.C, x, &bias_owner);
  p.rstd = floats(out.rstd);
  if (o.centered) out.mean = new_tensor(op, x, {2, v.R}, ScalarType::Float), p.mean = floats(out.mean);
  check(op, launch(p, on.stream));
  return out;
}

struct NormGradients {
  Tensor dx, dresidual, dweight, dbias;  // dx: empty unless asked for; it is dresidual, but for dropout and its dtype
};
struct NormSaved {
  const Tensor& total;  // what was normalised
  const OptTensor& weight;
  const Tensor* mean;  // null for RMSNorm
  const Tensor& rstd;
};
struct NormGradientTypes {
  ScalarType x, residual;
  i64 bias;  // its code; -1: none
  bool own_dx;
};
// n float32 values that forward has left.
inline float* statistic_of(const char* op, const char* name, const Tensor& t, i64 n, const Tensor& first,
                           Tensor* owner) {
  check_device(op, name, t, first);
  GPTFAST_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == n, op, ": ", name, " must be ", n,
                " float32 values");
  *owner = contiguous(op, t);
  return floats(*owner);
}
inline NormGradients norm_bwd(const char* op, NormLauncher launch, const OptTensor& dy, const OptTensor& dtotal,
                              const NormSaved& saved, const NormGradientTypes& types, const Dropout& dropout = {}) {
  const Tensor& total = saved.total;
  const View v = view_of(op, total);
  View g = v, d = v;
  LayerNormParams p{};
  p.x = v.rows(), p.R = v.R, p.C = v.C, p.dropout = dropout;
  if (dy) g = view_of(op, "dy", *dy, total), p.dy = g.rows();
  if (dtotal) d = view_of(op, "dtotal", *dtotal, total), p.dtotal = d.rows();
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && d.R == v.R && d.C == v.C && d.dtype == v.dtype, op,
                ": gradients and what was normalised differ in shape, or dtotal and it in dtype");
  const Launch on(total);
  NormGradients out;
  out.dresidual = new_like(op, total, types.residual), p.dresidual = mut_rows(op, out.dresidual, v.C);
  out.dx = types.own_dx ? new_like(op, total, types.x) : new_tensor(op, total, {0}, types.x);
  if (types.own_dx) p.dx = mut_rows(op, out.dx, v.C);
  Tensor weight_owner, mean_owner, rstd_owner;
  p.weight = vector_of(op, "weight", saved.weight, p.C, total, &weight_owner);
  if (saved.mean) p.mean = statistic_of(op, "mean", *saved.mean, 2 * p.R, total, &mean_owner);
  p.rstd = statistic_of(op, "rstd", saved.rstd, p.R, total, &rstd_owner);
  const i64 parts = norm_parts_of(p.R);
  const bool has_weight = bool(saved.weight), has_bias = types.bias >= 0;
  const auto room = [&](bool wanted) {
    return new_tensor(op, total, {wanted ? parts : 0, wanted ? p.C : 0}, ScalarType::Float);
  };
  Tensor weights = room(has_weight), biases = room(has_bias);
  p.dweight = has_weight ? floats(weights) : nullptr, p.dbias = has_bias ? floats(biases) : nullptr;
  check(op, launch(p, on.stream));
  const ScalarType weight_type = has_weight ? saved.weight->scalar_type() : ScalarType::Float;
  const ScalarType bias_type = has_bias ? dtype_of_code(op, types.bias) : ScalarType::Float;
  out.dweight = new_tensor(op, total, {has_weight ? p.C : 0}, weight_type);
  out.dbias = new_tensor(op, total, {has_bias ? p.C : 0}, bias_type);
  const PartialSums first{p.dweight, parts, p.C, out.dweight.mutable_data_ptr(), dtype_of(op, out.dweight)};
  const PartialSums second{p.dbias, parts, p.C, out.dbias.mutable_data_ptr(), dtype_of(op, out.dbias)};
  if (has_weight) check(op, sum_parts(first, second, on.stream));
  return out;
}

}  // namespace gptfast::cuda
