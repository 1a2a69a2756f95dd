// relu_squared on CUDA: checks, allocation, launch.
#include "cuda_common.h"
#include "flat.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "relu_squared";

Tensor fwd(const Tensor& x) {
  const View v = view_of(kOp, x);
  Tensor y = new_like(kOp, x);
  const Launch on(x);
  ReluSquaredParams p{};
  p.x = v.rows(), p.out = mut_rows(kOp, y, v.C), p.R = v.R, p.C = p.tail = v.C;
  if (v.stride == v.C) cut_flat(p, {&p.x.stride, &p.out.stride}, kFlatRow);
  check(kOp, relu_squared_fwd(p, on.stream));
  return y;
}

Tensor bwd(const Tensor& dout, const Tensor& x) {
  const View v = view_of(kOp, x), g = view_of(kOp, "dout", dout, x);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && g.dtype == v.dtype, kOp, ": dout and x differ in shape or dtype");
  Tensor dx = new_like(kOp, x);
  const Launch on(x);
  ReluSquaredParams p{};
  p.x = v.rows(), p.dout = g.rows(), p.out = mut_rows(kOp, dx, v.C), p.R = v.R, p.C = p.tail = v.C;
  if (v.stride == v.C && g.stride == v.C) cut_flat(p, {&p.x.stride, &p.dout.stride, &p.out.stride}, kFlatRow);
  check(kOp, relu_squared_bwd(p, on.stream));
  return dx;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("relu_squared_fwd", GPTFAST_BOX(&fwd));
  m.impl("relu_squared_bwd", GPTFAST_BOX(&bwd));
}

}  // namespace gptfast::cuda
