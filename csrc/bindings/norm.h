// What the norms share: layer_norm, add_layer_norm, rms_norm and add_rms_norm are one kernel.
#pragma once
#include "common.h"

namespace gptfast {

struct NormResults {
  Tensor y, total, mean, rstd;  // total: undefined without a residual; mean: undefined for RMSNorm
};
struct NormOptions {
  double eps;
  i64 y_type;
  bool centered;  // LayerNorm, which subtracts the mean
  Dropout dropout{};
};
inline NormResults norm_fwd(const char* op, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                            const OptTensor& bias, const NormOptions& o) {
  const RowView v = rows_of(op, x), r = residual ? rows_of(op, *residual) : v;
  GPTFAST_CHECK(r.R == v.R && r.C == v.C, op, ": x and residual differ in shape");
  NormResults out;
  Tensor weight_owner, bias_owner;
  LayerNormParams p{};
  const i64 results = residual ? 2 : 1;
  if (residual) {
    const bool same = x.scalar_type() == residual->scalar_type();
    out.total = new_like(x, same ? x.scalar_type() : ScalarType::Float);
    p.residual = r.rows(), p.total = mut_rows(op, out.total, v.C, results);
  }
  out.y = new_like(x, dtype_of_code(op, o.y_type)), out.rstd = new_tensor({v.R}, ScalarType::Float);
  p.x = v.rows(), p.y = mut_rows(op, out.y, v.C, results), p.R = v.R, p.C = v.C;
  p.eps = epsilon_of(op, o.eps), p.dropout = o.dropout;
  p.weight = vector_of(op, weight, v.C, &weight_owner), p.bias = vector_of(op, bias, v.C, &bias_owner);
  p.rstd = static_cast<float*>(out.rstd.mutable_data_ptr());
  if (o.centered) {
    out.mean = new_tensor({2, v.R}, ScalarType::Float);
    p.mean = static_cast<float*>(out.mean.mutable_data_ptr());
  }
  parallel(p.R, p.C * 8, [&](i64 begin, i64 end) { cpu::kernels().layer_norm_fwd(p, begin, end); });
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
inline NormGradients norm_bwd(const char* op, const OptTensor& dy, const OptTensor& dtotal, const NormSaved& saved,
                              const NormGradientTypes& types, const Dropout& dropout = {}) {
  const RowView v = rows_of(op, saved.total);
  RowView g = v, d = v;
  LayerNormParams p{};
  p.x = v.rows(), p.R = v.R, p.C = v.C, p.dropout = dropout;
  if (dy) g = rows_of(op, *dy), p.dy = g.rows();
  if (dtotal) d = rows_of(op, *dtotal), p.dtotal = d.rows();
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && d.R == v.R && d.C == v.C && d.dtype == v.dtype, op,
                ": gradients and what was normalised differ in shape, or dtotal and it in dtype");
  NormGradients out;
  out.dresidual = new_like(saved.total, types.residual);
  out.dx = types.own_dx ? new_like(saved.total, types.x) : new_tensor({0}, types.x);
  p.dresidual = mut_rows(op, out.dresidual, v.C);
  if (types.own_dx) p.dx = mut_rows(op, out.dx, v.C);
  Tensor weight_owner, mean_owner, rstd_owner;
  p.weight = vector_of(op, saved.weight, p.C, &weight_owner);
  if (saved.mean) p.mean = const_cast<float*>(floats_of(op, "mean", *saved.mean, 2 * p.R, &mean_owner));
  p.rstd = const_cast<float*>(floats_of(op, "rstd", saved.rstd, p.R, &rstd_owner));
  const i64 chunks = (p.R + cpu::kRowChunk - 1) / cpu::kRowChunk;
  const auto partial = [&](bool wanted) {
    return new_tensor({wanted ? chunks : 0, wanted ? p.C : 0}, ScalarType::Float);
  };
  Tensor dweight = partial(bool(saved.weight)), dbias = partial(types.bias >= 0);
  if (saved.weight) p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  if (types.bias >= 0) p.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  parallel(chunks, p.C * 8 * cpu::kRowChunk, [&](i64 begin, i64 end) { cpu::kernels().layer_norm_bwd(p, begin, end); });
  out.dweight = sum_chunks(op, dweight, saved.weight ? saved.weight->scalar_type() : ScalarType::Float);
  out.dbias = sum_chunks(op, dbias, types.bias >= 0 ? dtype_of_code(op, types.bias) : ScalarType::Float);
  return out;
}

}  // namespace gptfast
