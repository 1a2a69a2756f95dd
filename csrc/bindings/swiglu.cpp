// swiglu: checks, allocation, launch. gate and up are two tensors, or one whose rows hold both: in halves, which are two views
// of it, or interleaved, which the kernel takes apart.
#include "flat.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "swiglu";

struct Inputs {
  RowView gate, up;
  i64 F;  // columns of the result
  bool packed, interleaved;
  Inputs(const Tensor& g, const OptTensor& u, bool pairs)
      : gate(rows_of(kOp, g)), up(u ? rows_of(kOp, *u) : gate), F(u ? gate.C : gate.C / 2), packed(!u),
        interleaved(!u && pairs) {
    GPTFAST_CHECK(u || gate.C % 2 == 0, kOp, ": gate has ", gate.C, " columns, expected gate and up");
    GPTFAST_CHECK(up.R == gate.R && up.C == gate.C && up.dtype == gate.dtype, kOp,
                  ": gate and up differ in shape or dtype");
  }
  bool whole() const { return gate.stride == gate.C && up.stride == up.C && (!packed || interleaved); }
};

SwigluParams params_of(const Inputs& in, double alpha, double shift, double limit) {
  SwigluParams p{};
  GPTFAST_CHECK(std::isfinite(float(alpha)) && std::isfinite(float(shift)) && limit > 0, kOp, ": alpha is ", alpha,
                ", shift ", shift, " and limit ", limit, "; expected finite numbers and a limit > 0");
  p.gate = in.gate.rows(), p.up = in.up.rows(), p.R = in.gate.R, p.C = p.tail = in.F;
  if (in.packed) p.up.data = static_cast<const char*>(p.gate.data) + in.F * element_size(p.gate.dtype);
  p.alpha = float(alpha), p.shift = float(shift), p.limit = float(limit), p.interleaved = in.interleaved;
  return p;
}
void cut(SwigluParams& p, std::initializer_list<i64*> strides) {
  cut_flat(p, strides);
  if (p.interleaved && p.R) p.gate.stride = 2 * p.C, p.dgate.stride = 2 * p.C;
}

Tensor swiglu_fwd(const Tensor& gate, const OptTensor& up, bool interleaved, double alpha, double shift, double limit) {
  const Inputs in(gate, up, interleaved);
  std::vector<i64> size(gate.sizes().begin(), gate.sizes().end());
  size.back() = in.F;
  Tensor y = new_tensor({size.data(), size.size()}, gate.scalar_type());
  SwigluParams p = params_of(in, alpha, shift, limit);
  p.out = mut_rows(kOp, y, in.F);
  if (in.whole()) cut(p, {&p.gate.stride, &p.up.stride, &p.out.stride});
  parallel(p.R, p.C * 16, [&](i64 begin, i64 end) { cpu::kernels().swiglu_fwd(p, begin, end); });
  return y;
}

// dgate has both gradients where gate has both; dup is then empty.
std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dout, const Tensor& gate, const OptTensor& up, bool interleaved,
                                      double alpha, double shift, double limit) {
  const Inputs in(gate, up, interleaved);
  const RowView g = rows_of(kOp, dout);
  GPTFAST_CHECK(g.R == in.gate.R && g.C == in.F && g.dtype == in.gate.dtype, kOp,
                ": dout and the result differ in shape or dtype");
  Tensor dgate = new_like(gate), dup = in.packed ? new_tensor({0}, gate.scalar_type()) : new_like(gate);
  SwigluParams p = params_of(in, alpha, shift, limit);
  p.dout = g.rows(), p.dgate = p.dup = mut_rows(kOp, dgate, in.gate.C, in.packed ? 1 : 2);
  if (!in.packed) p.dup = mut_rows(kOp, dup, in.F, 2);
  else p.dup.data = static_cast<char*>(p.dgate.data) + in.F * element_size(p.dgate.dtype);
  if (in.packed && !in.interleaved) p.dgate.non_temporal &= in.F * element_size(p.dgate.dtype) % 64 == 0;
  if (in.whole() && g.stride == g.C)
    cut(p, {&p.gate.stride, &p.up.stride, &p.dout.stride, &p.dgate.stride, &p.dup.stride});
  parallel(p.R, p.C * 24, [&](i64 begin, i64 end) { cpu::kernels().swiglu_bwd(p, begin, end); });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("swiglu_fwd", GPTFAST_BOX(&swiglu_fwd));
  m.impl("swiglu_bwd", GPTFAST_BOX(&swiglu_bwd));
}

}  // namespace gptfast
