// swiglu on CUDA: checks, allocation, launch. gate and up are two tensors, or one whose rows hold both: in halves, which are two
// views of it, or interleaved, which the kernel takes apart.
#include "cuda_common.h"
#include "flat.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "swiglu";

struct Inputs {
  View gate, up;
  i64 F;  // columns of the result
  bool packed, interleaved;
  Inputs(const Tensor& g, const OptTensor& u, bool pairs)
      : gate(view_of(kOp, "gate", g, g)), up(u ? view_of(kOp, "up", *u, g) : gate), F(u ? gate.C : gate.C / 2),
        packed(!u), interleaved(!u && pairs) {
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
  cut_flat(p, strides, kFlatRow);
  if (p.interleaved && p.R) p.gate.stride = 2 * p.C, p.dgate.stride = 2 * p.C;
}

Tensor fwd(const Tensor& gate, const OptTensor& up, bool interleaved, double alpha, double shift, double limit) {
  const Inputs in(gate, up, interleaved);
  const Launch on(gate);
  std::vector<i64> size(gate.sizes().begin(), gate.sizes().end());
  size.back() = in.F;
  Tensor y = new_tensor(kOp, gate, IntHeaderOnlyArrayRef(size.data(), size.size()), gate.scalar_type());
  SwigluParams p = params_of(in, alpha, shift, limit);
  p.out = mut_rows(kOp, y, in.F);
  if (in.whole()) cut(p, {&p.gate.stride, &p.up.stride, &p.out.stride});
  check(kOp, swiglu_fwd(p, on.stream));
  return y;
}

// dgate has both gradients where gate has both; dup is then empty.
std::tuple<Tensor, Tensor> bwd(const Tensor& dout, const Tensor& gate, const OptTensor& up, bool interleaved,
                               double alpha, double shift, double limit) {
  const Inputs in(gate, up, interleaved);
  const View g = view_of(kOp, "dout", dout, gate);
  GPTFAST_CHECK(g.R == in.gate.R && g.C == in.F && g.dtype == in.gate.dtype, kOp,
                ": dout and the result differ in shape or dtype");
  const Launch on(gate);
  Tensor dgate = new_like(kOp, gate);
  Tensor dup = in.packed ? new_tensor(kOp, gate, {0}, gate.scalar_type()) : new_like(kOp, gate);
  SwigluParams p = params_of(in, alpha, shift, limit);
  p.dout = g.rows(), p.dgate = p.dup = mut_rows(kOp, dgate, in.gate.C);
  if (!in.packed) p.dup = mut_rows(kOp, dup, in.F);
  else p.dup.data = static_cast<char*>(p.dgate.data) + in.F * element_size(p.dgate.dtype);
  if (in.whole() && g.stride == g.C)
    cut(p, {&p.gate.stride, &p.up.stride, &p.dout.stride, &p.dgate.stride, &p.dup.stride});
  check(kOp, swiglu_bwd(p, on.stream));
  return {dgate, dup};
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("swiglu_fwd", GPTFAST_BOX(&fwd));
  m.impl("swiglu_bwd", GPTFAST_BOX(&bwd));
}

}  // namespace gptfast::cuda
