// layer_norm and add_layer_norm: checks, allocation, launch. One kernel serves both.
#include "common.h"

namespace gptfast {
namespace {

i64 chunks_of(i64 R) { return (R + cpu::kRowChunk - 1) / cpu::kRowChunk; }

void launch_fwd(const LayerNormParams& p) {
  parallel(p.R, p.C * 8, [&](i64 begin, i64 end) { cpu::kernels().layer_norm_fwd(p, begin, end); });
}

// Runs the backward kernel and adds up the chunks; fills everything of p that belongs to the weights.
std::tuple<Tensor, Tensor> launch_bwd(const char* op, LayerNormParams& p, const Tensor& weight, i64 bias_type,
                                      const Tensor& mean, const Tensor& rstd) {
  Tensor weight_owner, mean_owner, rstd_owner;
  p.weight = vector_of(op, weight, p.C, &weight_owner);
  p.mean = const_cast<float*>(floats_of(op, "mean", mean, 2 * p.R, &mean_owner));
  p.rstd = const_cast<float*>(floats_of(op, "rstd", rstd, p.R, &rstd_owner));
  const i64 chunks = chunks_of(p.R);
  const bool has_bias = bias_type >= 0;
  Tensor dweight = new_tensor({chunks, p.C}, ScalarType::Float);
  Tensor dbias = new_tensor({has_bias ? chunks : 0, has_bias ? p.C : 0}, ScalarType::Float);
  p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  p.dbias = has_bias ? static_cast<float*>(dbias.mutable_data_ptr()) : nullptr;
  parallel(chunks, p.C * 8 * cpu::kRowChunk, [&](i64 begin, i64 end) { cpu::kernels().layer_norm_bwd(p, begin, end); });
  const ScalarType bias_dtype = has_bias ? dtype_of_code(op, bias_type) : ScalarType::Float;
  return {sum_chunks(op, dweight, weight.scalar_type()), sum_chunks(op, dbias, bias_dtype)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                                  double eps, i64 y_type) {
  constexpr const char* op = "layer_norm";
  const RowView v = rows_of(op, x);
  Tensor y = new_like(x, dtype_of_code(op, y_type)), weight_owner, bias_owner;
  Tensor mean = new_tensor({2, v.R}, ScalarType::Float), rstd = new_tensor({v.R}, ScalarType::Float);
  LayerNormParams p{};
  p.x = v.rows(), p.y = mut_rows(op, y, v.C), p.R = v.R, p.C = v.C, p.eps = epsilon_of(op, eps);
  p.weight = vector_of(op, weight, v.C, &weight_owner), p.bias = vector_of(op, bias, v.C, &bias_owner);
  p.mean = static_cast<float*>(mean.mutable_data_ptr()), p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  launch_fwd(p);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, i64 bias_type) {
  constexpr const char* op = "layer_norm";
  const RowView v = rows_of(op, x), g = rows_of(op, dy);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C, op, ": dy and x differ in shape");
  Tensor dx = new_like(x);
  LayerNormParams p{};
  p.x = v.rows(), p.dy = g.rows(), p.dx = mut_rows(op, dx, v.C), p.R = v.R, p.C = v.C;
  auto [dweight, dbias] = launch_bwd(op, p, weight, bias_type, mean, rstd);
  return {dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const Tensor& weight, const OptTensor& bias, double eps,
                                                              double dropout_p, i64 seed, i64 offset, i64 y_type) {
  constexpr const char* op = "add_layer_norm";
  const RowView v = rows_of(op, x), r = rows_of(op, residual);
  GPTFAST_CHECK(r.R == v.R && r.C == v.C, op, ": x and residual differ in shape");
  const ScalarType total_type = x.scalar_type() == residual.scalar_type() ? x.scalar_type() : ScalarType::Float;
  Tensor total = new_like(x, total_type), y = new_like(x, dtype_of_code(op, y_type)), weight_owner, bias_owner;
  Tensor mean = new_tensor({2, v.R}, ScalarType::Float), rstd = new_tensor({v.R}, ScalarType::Float);
  LayerNormParams p{};
  p.x = v.rows(), p.residual = r.rows(), p.total = mut_rows(op, total, v.C, 2), p.y = mut_rows(op, y, v.C, 2);
  p.R = v.R, p.C = v.C, p.eps = epsilon_of(op, eps), p.dropout = dropout_of_rows(dropout_p, seed, offset);
  p.weight = vector_of(op, weight, v.C, &weight_owner), p.bias = vector_of(op, bias, v.C, &bias_owner);
  p.mean = static_cast<float*>(mean.mutable_data_ptr()), p.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  launch_fwd(p);
  return {y, total, mean, rstd};
}

// dx is left empty where it would equal dresidual: without dropout and with x_type == residual_type.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_bwd(const OptTensor& dy, const OptTensor& dtotal,
                                                              const Tensor& total, const Tensor& weight,
                                                              const Tensor& mean, const Tensor& rstd, i64 bias_type,
                                                              i64 x_type, i64 residual_type, double dropout_p, i64 seed,
                                                              i64 offset) {
  constexpr const char* op = "add_layer_norm";
  const ScalarType x_dtype = dtype_of_code(op, x_type), residual_dtype = dtype_of_code(op, residual_type);
  const RowView v = rows_of(op, total);
  RowView g = v, d = v;
  LayerNormParams p{};
  p.x = v.rows(), p.R = v.R, p.C = v.C, p.dropout = dropout_of_rows(dropout_p, seed, offset);
  if (dy) g = rows_of(op, *dy), p.dy = g.rows();
  if (dtotal) d = rows_of(op, *dtotal), p.dtotal = d.rows();
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && d.R == v.R && d.C == v.C && d.dtype == v.dtype, op,
                ": gradients and total differ in shape, or dtotal and total in dtype");
  const bool own_dx = p.dropout.threshold || x_type != residual_type;
  Tensor dresidual = new_like(total, residual_dtype);
  Tensor dx = own_dx ? new_like(total, x_dtype) : new_tensor({0}, x_dtype);
  p.dresidual = mut_rows(op, dresidual, v.C);
  if (own_dx) p.dx = mut_rows(op, dx, v.C);
  auto [dweight, dbias] = launch_bwd(op, p, weight, bias_type, mean, rstd);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("add_layer_norm_bwd", TORCH_BOX(&add_layer_norm_bwd));
}

}  // namespace gptfast
