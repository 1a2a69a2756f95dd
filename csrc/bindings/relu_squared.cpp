// relu_squared: checks, allocation, launch.
#include "flat.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "relu_squared";

Tensor relu_squared_fwd(const Tensor& x) {
  const RowView v = rows_of(kOp, x);
  Tensor y = new_like(x);
  ReluSquaredParams p{};
  p.x = v.rows(), p.out = mut_rows(kOp, y, v.C), p.R = v.R, p.C = p.tail = v.C;
  if (v.stride == v.C) cut_flat(p, {&p.x.stride, &p.out.stride});
  parallel(p.R, p.C * 8, [&](i64 begin, i64 end) { cpu::kernels().relu_squared_fwd(p, begin, end); });
  return y;
}

Tensor relu_squared_bwd(const Tensor& dout, const Tensor& x) {
  const RowView v = rows_of(kOp, x), g = rows_of(kOp, dout);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && g.dtype == v.dtype, kOp, ": dout and x differ in shape or dtype");
  Tensor dx = new_like(x);
  ReluSquaredParams p{};
  p.x = v.rows(), p.dout = g.rows(), p.out = mut_rows(kOp, dx, v.C), p.R = v.R, p.C = p.tail = v.C;
  if (v.stride == v.C && g.stride == v.C) cut_flat(p, {&p.x.stride, &p.dout.stride, &p.out.stride});
  parallel(p.R, p.C * 12, [&](i64 begin, i64 end) { cpu::kernels().relu_squared_bwd(p, begin, end); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("relu_squared_fwd", GPTFAST_BOX(&relu_squared_fwd));
  m.impl("relu_squared_bwd", GPTFAST_BOX(&relu_squared_bwd));
}

}  // namespace gptfast
