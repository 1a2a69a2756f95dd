// gelu on CUDA: checks, allocation, launch.
#include "cuda_common.h"
#include "flat.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "gelu";

Tensor fwd(const Tensor& x, const OptTensor& bias, bool tanh) {
  const View v = view_of(kOp, x);
  Tensor out = new_like(kOp, x), bias_owner;
  if (!x.numel()) return out;
  const Launch on(x);
  GeluParams p{
      v.rows(), vector_of(kOp, "bias", bias, v.C, x, &bias_owner), {}, mut_rows(kOp, out, v.C), nullptr, v.R, v.C, v.C,
      tanh};
  if (!bias && v.stride == v.C) cut_flat(p, {&p.x.stride, &p.out.stride}, kFlatRow);  // the shape does not matter
  check(kOp, gelu_fwd(p, on.stream));
  return out;
}

std::tuple<Tensor, Tensor> bwd(const Tensor& dout, const Tensor& x, const OptTensor& bias, bool tanh) {
  const View v = view_of(kOp, x), g = view_of(kOp, "dout", dout, x);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && g.dtype == v.dtype, kOp, ": dout and x differ in shape or dtype");
  Tensor dx = new_like(kOp, x), bias_owner;
  const Launch on(x);
  GeluParams p{v.rows(), vector_of(kOp, "bias", bias, v.C, x, &bias_owner),
               g.rows(), mut_rows(kOp, dx, v.C),
               nullptr,  v.R,
               v.C,      v.C,
               tanh};
  Tensor partial = new_tensor(kOp, x, {bias ? parts_of(v.R) : 0, bias ? v.C : 0}, ScalarType::Float);
  if (bias) p.dbias = floats(partial);
  else if (v.stride == v.C && g.stride == v.C) cut_flat(p, {&p.x.stride, &p.dout.stride, &p.out.stride}, kFlatRow);
  check(kOp, gelu_bwd(p, on.stream));
  return {dx, sum_of_parts(kOp, partial, bias ? bias->scalar_type() : ScalarType::Float, on.stream)};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("gelu_fwd", GPTFAST_BOX(&fwd));
  m.impl("gelu_bwd", GPTFAST_BOX(&bwd));
}

}  // namespace gptfast::cuda
