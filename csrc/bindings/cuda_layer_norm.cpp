// layer_norm and add_layer_norm on CUDA: checks, allocation, launch. One kernel serves both.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

// Runs the backward kernel and adds up the parts; fills everything of p that belongs to the weights.
std::tuple<Tensor, Tensor> launch_bwd(const char* op, LayerNormParams& p, const Tensor& x, const Tensor& weight,
                                      i64 bias_type, const Tensor& mean, const Tensor& rstd) {
  const Launch on(x);
  Tensor weight_owner;
  p.weight = vector_of(op, "weight", weight, p.C, x, &weight_owner);
  check_device(op, "mean", mean, x);
  check_device(op, "rstd", rstd, x);
  GPTFAST_CHECK(mean.numel() == 2 * p.R && rstd.numel() == p.R && mean.scalar_type() == ScalarType::Float &&
                    rstd.scalar_type() == ScalarType::Float,
                op, ": mean must be float32 (2, rows) and rstd (rows)");
  const Tensor mean_owner = contiguous(op, mean), rstd_owner = contiguous(op, rstd);
  p.mean = floats(mean_owner), p.rstd = floats(rstd_owner);
  const i64 parts = norm_parts_of(p.R);
  const bool has_bias = bias_type >= 0;
  Tensor dweight = new_tensor(op, x, {parts, p.C}, ScalarType::Float);
  Tensor dbias = new_tensor(op, x, {has_bias ? parts : 0, has_bias ? p.C : 0}, ScalarType::Float);
  p.dweight = floats(dweight), p.dbias = has_bias ? floats(dbias) : nullptr;
  check(op, layer_norm_bwd(p, on.stream));
  const ScalarType bias_dtype = has_bias ? dtype_of_code(op, bias_type) : ScalarType::Float;
  Tensor weight_sum = new_tensor(op, x, {p.C}, weight.scalar_type());
  Tensor bias_sum = new_tensor(op, x, {has_bias ? p.C : 0}, bias_dtype);
  const PartialSums weights{p.dweight, parts, p.C, weight_sum.mutable_data_ptr(), dtype_of(op, weight_sum)};
  const PartialSums biases{p.dbias, parts, p.C, bias_sum.mutable_data_ptr(), dtype_of(op, bias_sum)};
  check(op, sum_parts(weights, biases, on.stream));
  return {weight_sum, bias_sum};
}

std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias, double eps,
                                       i64 y_type) {
  constexpr const char* op = "layer_norm";
  const View v = view_of(op, x);
  const Launch on(x);
  Tensor y = new_like(op, x, dtype_of_code(op, y_type)), weight_owner, bias_owner;
  Tensor mean = new_tensor(op, x, {2, v.R}, ScalarType::Float), rstd = new_tensor(op, x, {v.R}, ScalarType::Float);
  LayerNormParams p{};
  p.x = v.rows(), p.y = mut_rows(op, y, v.C), p.R = v.R, p.C = v.C, p.eps = epsilon_of(op, eps);
  p.weight = vector_of(op, "weight", weight, v.C, x, &weight_owner);
  p.bias = vector_of(op, "bias", bias, v.C, x, &bias_owner);
  p.mean = floats(mean), p.rstd = floats(rstd);
  check(op, layer_norm_fwd(p, on.stream));
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& mean,
                                       const Tensor& rstd, i64 bias_type) {
  constexpr const char* op = "layer_norm";
  const View v = view_of(op, x), g = view_of(op, "dy", dy, x);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C, op, ": dy and x differ in shape");
  Tensor dx = new_like(op, x);
  LayerNormParams p{};
  p.x = v.rows(), p.dy = g.rows(), p.dx = mut_rows(op, dx, v.C), p.R = v.R, p.C = v.C;
  auto [dweight, dbias] = launch_bwd(op, p, x, weight, bias_type, mean, rstd);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_fwd(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                   const OptTensor& bias, double eps, double dropout_p, i64 seed,
                                                   i64 offset, i64 y_type) {
  constexpr const char* op = "add_layer_norm";
  const View v = view_of(op, x), r = view_of(op, "residual", residual, x);
  GPTFAST_CHECK(r.R == v.R && r.C == v.C, op, ": x and residual differ in shape");
  const Launch on(x);
  const ScalarType total_type = x.scalar_type() == residual.scalar_type() ? x.scalar_type() : ScalarType::Float;
  Tensor total = new_like(op, x, total_type), y = new_like(op, x, dtype_of_code(op, y_type)), weight_owner, bias_owner;
  Tensor mean = new_tensor(op, x, {2, v.R}, ScalarType::Float), rstd = new_tensor(op, x, {v.R}, ScalarType::Float);
  LayerNormParams p{};
  p.x = v.rows(), p.residual = r.rows(), p.total = mut_rows(op, total, v.C), p.y = mut_rows(op, y, v.C);
  p.R = v.R, p.C = v.C, p.eps = epsilon_of(op, eps), p.dropout = dropout_of_rows(dropout_p, seed, offset);
  p.weight = vector_of(op, "weight", weight, v.C, x, &weight_owner);
  p.bias = vector_of(op, "bias", bias, v.C, x, &bias_owner);
  p.mean = floats(mean), p.rstd = floats(rstd);
  check(op, layer_norm_fwd(p, on.stream));
  return {y, total, mean, rstd};
}

// dx is left empty where it would equal dresidual: without dropout and with x_type == residual_type.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_bwd(const OptTensor& dy, const OptTensor& dtotal, const Tensor& total,
                                                   const Tensor& weight, const Tensor& mean, const Tensor& rstd,
                                                   i64 bias_type, i64 x_type, i64 residual_type, double dropout_p,
                                                   i64 seed, i64 offset) {
  constexpr const char* op = "add_layer_norm";
  const ScalarType x_dtype = dtype_of_code(op, x_type), residual_dtype = dtype_of_code(op, residual_type);
  const View v = view_of(op, total);
  View g = v, d = v;
  LayerNormParams p{};
  p.x = v.rows(), p.R = v.R, p.C = v.C, p.dropout = dropout_of_rows(dropout_p, seed, offset);
  if (dy) g = view_of(op, "dy", *dy, total), p.dy = g.rows();
  if (dtotal) d = view_of(op, "dtotal", *dtotal, total), p.dtotal = d.rows();
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && d.R == v.R && d.C == v.C && d.dtype == v.dtype, op,
                ": gradients and total differ in shape, or dtotal and total in dtype");
  const bool own_dx = p.dropout.threshold || x_type != residual_type;
  Tensor dresidual = new_like(op, total, residual_dtype);
  Tensor dx = own_dx ? new_like(op, total, x_dtype) : new_tensor(op, total, {0}, x_dtype);
  p.dresidual = mut_rows(op, dresidual, v.C);
  if (own_dx) p.dx = mut_rows(op, dx, v.C);
  auto [dweight, dbias] = launch_bwd(op, p, total, weight, bias_type, mean, rstd);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_bwd));
}

}  // namespace gptfast::cuda
