// layer_norm and add_layer_norm on CUDA: checks, allocation, launch (cuda_norm.h).
#include "cuda_norm.h"

namespace gptfast::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias, double eps,
                                       i64 y_type) {
  const NormResults out = norm_fwd("layer_norm", layer_norm_fwd, x, {}, weight, bias, {eps, y_type, true});
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                       const Tensor& rstd, i64 bias_type) {
  const NormGradientTypes types{defined(x).scalar_type(), x.scalar_type(), bias_type, false};
  const NormGradients out = norm_bwd("layer_norm", layer_norm_bwd, dy, {}, {x, weight, &mean, rstd}, types);
  return {out.dresidual, out.dweight, out.dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                   const OptTensor& bias, double eps, double dropout_p, i64 seed,
                                                   i64 offset, i64 y_type) {
  const NormOptions options{eps, y_type, true, dropout_of_rows(dropout_p, seed, offset)};
  const NormResults out = norm_fwd("add_layer_norm", layer_norm_fwd, x, residual, weight, bias, options);
  return {out.y, out.total, out.mean, out.rstd};
}

// dx is left empty where it would equal dresidual: without dropout and with x_type == residual_type.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_bwd(const OptTensor& dy, const OptTensor& dtotal, const Tensor& total,
                                                   const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                   i64 bias_type, i64 x_type, i64 residual_type, double dropout_p,
                                                   i64 seed, i64 offset) {
  constexpr const char* op = "add_layer_norm";
  const Dropout dropout = dropout_of_rows(dropout_p, seed, offset);
  const NormGradientTypes types{dtype_of_code(op, x_type), dtype_of_code(op, residual_type), bias_type,
                                dropout.threshold || x_type != residual_type};
  const NormGradients out = norm_bwd(op, layer_norm_bwd, dy, dtotal, {total, weight, &mean, rstd}, types, dropout);
  return {out.dx, out.dresidual, out.dweight, out.dbias};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("layer_norm_fwd", GPTFAST_BOX(&fwd));
  m.impl("layer_norm_bwd", GPTFAST_BOX(&bwd));
  m.impl("add_layer_norm_fwd", GPTFAST_BOX(&add_fwd));
  m.impl("add_layer_norm_bwd", GPTFAST_BOX(&add_bwd));
}

}  // namespace gptfast::cuda
