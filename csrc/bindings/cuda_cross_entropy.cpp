// cross_entropy on CUDA: checks, allocation, launch. Targets are not read here, which would wait for the GPU: a row whose
// target is outside the vocabulary gets the loss nan.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "cross_entropy";

// Everything that the three launches share; `owners` keeps copies alive.
CrossEntropyParams params_of(const View& x, const Tensor& logits, const Tensor& targets, const OptTensor& dloss,
                             i64 ignore_index, double label_smoothing, Tensor (&owners)[2]) {
  CrossEntropyParams p{};
  p.logits = x.rows(), p.R = x.R, p.V = x.C, p.ignore_index = ignore_index;
  p.targets = indices_of(kOp, "targets", targets, x.R, logits, &owners[0]);
  p.label_smoothing = smoothing_of(kOp, label_smoothing);
  GPTFAST_CHECK(!dloss || defined(*dloss).scalar_type() == ScalarType::Float, kOp, ": dloss must be float32");
  p.dloss = static_cast<const float*>(vector_of(kOp, "dloss", dloss, x.R, logits, &owners[1]).data);
  return p;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& logits, const Tensor& targets, i64 ignore_index, double label_smoothing) {
  const View x = view_of(kOp, logits);
  const Launch on(logits);
  Tensor owners[2];
  CrossEntropyParams p = params_of(x, logits, targets, {}, ignore_index, label_smoothing, owners);
  Tensor loss = new_tensor(kOp, logits, {x.R}, ScalarType::Float),
         lse = new_tensor(kOp, logits, {x.R, 2}, ScalarType::Float);
  p.loss = floats(loss), p.lse = floats(lse);
  check(kOp, cross_entropy_fwd(p, on.stream));
  return {loss, lse};
}

Tensor bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse, i64 ignore_index,
           double label_smoothing) {
  const View x = view_of(kOp, logits);
  const Launch on(logits);
  Tensor owners[2];
  CrossEntropyParams p = params_of(x, logits, targets, dloss, ignore_index, label_smoothing, owners);
  check_device(kOp, "lse", lse, logits);
  GPTFAST_CHECK(lse.numel() == 2 * x.R && lse.scalar_type() == ScalarType::Float, kOp,
                ": lse must be float32 with two values a row");
  const Tensor lse_owner = contiguous(kOp, lse);
  Tensor dlogits = new_like(kOp, logits);
  p.lse = floats(lse_owner), p.dlogits = mut_rows(kOp, dlogits, x.C);
  check(kOp, cross_entropy_bwd(p, on.stream));
  return dlogits;
}

// Loss of each row; then its gradient takes the place of the logits.
Tensor in_place(Tensor& logits, const Tensor& targets, const OptTensor& dloss, i64 ignore_index,
                double label_smoothing) {
  const View x = view_of(kOp, logits);
  GPTFAST_CHECK(x.owner.const_data_ptr() == logits.const_data_ptr() && (x.R <= 1 || x.stride >= x.C), kOp,
                ": logits must lie in rows that do not overlap");
  const Launch on(logits);
  Tensor owners[2];
  CrossEntropyParams p = params_of(x, logits, targets, dloss, ignore_index, label_smoothing, owners);
  Tensor loss = new_tensor(kOp, logits, {x.R}, ScalarType::Float);
  p.loss = floats(loss), p.dlogits = {logits.mutable_data_ptr(), x.stride, x.dtype};
  check(kOp, cross_entropy_in_place(p, on.stream));
  return loss;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("cross_entropy_fwd", GPTFAST_BOX(&fwd));
  m.impl("cross_entropy_bwd", GPTFAST_BOX(&bwd));
  m.impl("cross_entropy_in_place", GPTFAST_BOX(&in_place));
}

}  // namespace gptfast::cuda
