// rms_norm and add_rms_norm on CUDA: checks, allocation, launch (cuda_norm.h).
#include "cuda_norm.h"

namespace gptfast::cuda {
namespace {

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const OptTensor& weight, double eps, i64 y_type) {
  const NormResults out = norm_fwd("rms_norm", rms_norm_fwd, x, {}, weight, {}, {eps, y_type, false});
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x, const OptTensor& weight, const Tensor& rstd) {
  const NormGradientTypes types{defined(x).scalar_type(), x.scalar_type(), -1, false};
  const NormGradients out = norm_bwd("rms_norm", rms_norm_bwd, dy, {}, {x, weight, nullptr, rstd}, types);
  return {out.dresidual, out.dweight};
}

std::tuple<Tensor, Tensor, Tensor> add_fwd(const Tensor& x, const Tensor& residual, const OptTensor& weight, double eps,
                                           double dropout_p, i64 seed, i64 offset, i64 y_type) {
  const NormOptions options{eps, y_type, false, dropout_of_rows(dropout_p, seed, offset)};
  const NormResults out = norm_fwd("add_rms_norm", rms_norm_fwd, x, residual, weight, {}, options);
  return {out.y, out.total, out.rstd};
}

// dx is left empty where it would equal dresidual: without dropout and with x_type == residual_type.
std::tuple<Tensor, Tensor, Tensor> add_bwd(const OptTensor& dy, const OptTensor& dtotal, const Tensor& total,
                                           const OptTensor& weight, const Tensor& rstd, i64 x_type, i64 residual_type,
                                           double dropout_p, i64 seed, i64 offset) {
  constexpr const char* op = "add_rms_norm";
  const Dropout dropout = dropout_of_rows(dropout_p, seed, offset);
  const NormGradientTypes types{dtype_of_code(op, x_type), dtype_of_code(op, residual_type), -1,
                                dropout.threshold || x_type != residual_type};
  const NormGradients out = norm_bwd(op, rms_norm_bwd, dy, dtotal, {total, weight, nullptr, rstd}, types, dropout);
  return {out.dx, out.dresidual, out.dweight};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("rms_norm_fwd", GPTFAST_BOX(&fwd));
  m.impl("rms_norm_bwd", GPTFAST_BOX(&bwd));
  m.impl("add_rms_norm_fwd", GPTFAST_BOX(&add_fwd));
  m.impl("add_rms_norm_bwd", GPTFAST_BOX(&add_bwd));
}

}  // namespace gptfast::cuda
