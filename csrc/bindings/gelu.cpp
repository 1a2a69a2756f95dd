// gelu: checks, allocation, launch. The worked example of CONTRIBUTING.md.
#include "flat.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "gelu";

Tensor gelu_fwd(const Tensor& x, const OptTensor& bias, bool tanh) {
  const RowView v = rows_of(kOp, x);
  Tensor out = new_like(x), bias_owner;
  if (!x.numel()) return out;
  GeluParams p{v.rows(), vector_of(kOp, bias, v.C, &bias_owner), {}, mut_rows(kOp, out, v.C), nullptr, v.R, v.C, v.C,
               tanh};
  if (!bias && v.stride == v.C) cut_flat(p, {&p.x.stride, &p.dout.stride, &p.out.stride});  // a bias needs columns
  parallel(p.R, p.C * 8, [&](i64 begin, i64 end) { cpu::kernels().gelu_fwd(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gelu_bwd(const Tensor& dout, const Tensor& x, const OptTensor& bias, bool tanh) {
  const RowView v = rows_of(kOp, x), g = rows_of(kOp, dout);
  GPTFAST_CHECK(g.R == v.R && g.C == v.C && g.dtype == v.dtype, kOp, ": dout and x differ in shape or dtype");
  Tensor dx = new_like(x), bias_owner;
  GeluParams p{
      v.rows(), vector_of(kOp, bias, v.C, &bias_owner), g.rows(), mut_rows(kOp, dx, v.C), nullptr, v.R, v.C, v.C, tanh};
  const i64 chunks = (v.R + cpu::kRowChunk - 1) / cpu::kRowChunk;
  const ScalarType bias_dtype = bias ? bias->scalar_type() : ScalarType::Float;
  Tensor partial = new_tensor({bias ? chunks : 0, bias ? v.C : 0}, ScalarType::Float);
  if (bias) p.dbias = static_cast<float*>(partial.mutable_data_ptr());
  else if (v.stride == v.C && g.stride == v.C && x.numel()) cut_flat(p, {&p.x.stride, &p.dout.stride, &p.out.stride});
  parallel((p.R + cpu::kRowChunk - 1) / cpu::kRowChunk, p.C * 8 * cpu::kRowChunk,
           [&](i64 begin, i64 end) { cpu::kernels().gelu_bwd(p, begin, end); });
  return {dx, sum_chunks(kOp, partial, bias_dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("gelu_fwd", GPTFAST_BOX(&gelu_fwd));
  m.impl("gelu_bwd", GPTFAST_BOX(&gelu_bwd));
}

}  // namespace gptfast
