// cross_entropy: checks, allocation, launch.
#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "cross_entropy";

struct Targets {
  Tensor owner;
  const i64* data;
  Targets(const Tensor& t, i64 rows, i64 V, i64 ignore_index) : owner(torch::stable::contiguous(defined(t))) {
    GPTFAST_CHECK(on_cpu(t) && t.scalar_type() == ScalarType::Long && t.numel() == rows, kOp,
                  ": targets must be an int64 CPU tensor with one entry per row");
    data = static_cast<const i64*>(owner.const_data_ptr());
    for (i64 r = 0; r < rows; r++)
      GPTFAST_CHECK((data[r] >= 0 && data[r] < V) || data[r] == ignore_index, kOp, ": targets[", r, "] is ", data[r],
                    "; expected 0 to ", V - 1, " or ignore_index (", ignore_index, ") - check the vocabulary size");
  }
};

CrossEntropyParams params_of(const RowView& x, const Targets& targets, i64 ignore_index, double label_smoothing) {
  CrossEntropyParams p{};
  p.logits = x.rows(), p.targets = targets.data, p.R = x.R, p.V = x.C, p.ignore_index = ignore_index;
  p.label_smoothing = smoothing_of(kOp, label_smoothing);
  return p;
}

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& logits, const Tensor& targets, i64 ignore_index,
                                             double label_smoothing) {
  const RowView x = rows_of(kOp, logits);
  const Targets t(targets, x.R, x.C, ignore_index);
  CrossEntropyParams p = params_of(x, t, ignore_index, label_smoothing);
  Tensor loss = new_tensor({x.R}, ScalarType::Float), lse = new_tensor({x.R, 2}, ScalarType::Float);
  p.loss = static_cast<float*>(loss.mutable_data_ptr()), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  parallel(x.R, x.C * 8, [&](i64 begin, i64 end) { cpu::kernels().cross_entropy_fwd(p, begin, end); });
  return {loss, lse};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& logits, const Tensor& targets, const Tensor& lse,
                         i64 ignore_index, double label_smoothing) {
  const RowView x = rows_of(kOp, logits);
  const Targets t(targets, x.R, x.C, ignore_index);
  CrossEntropyParams p = params_of(x, t, ignore_index, label_smoothing);
  Tensor owners[2];
  p.dloss = floats_of(kOp, "dloss", dloss, x.R, &owners[0]);
  p.lse = const_cast<float*>(floats_of(kOp, "lse", lse, 2 * x.R, &owners[1]));
  Tensor dlogits = new_like(logits);
  p.dlogits = mut_rows(kOp, dlogits, x.C);
  parallel(x.R, x.C * 8, [&](i64 begin, i64 end) { cpu::kernels().cross_entropy_bwd(p, begin, end); });
  return dlogits;
}

// Loss of each row; then its gradient takes the place of the logits, while the row is in cache.
Tensor cross_entropy_in_place(Tensor& logits, const Tensor& targets, const OptTensor& dloss, i64 ignore_index,
                              double label_smoothing) {
  const RowView x = rows_of(kOp, logits);
  GPTFAST_CHECK(x.owner.const_data_ptr() == logits.const_data_ptr() && (x.R <= 1 || x.stride >= x.C), kOp,
                ": logits must lie in rows that do not overlap");
  const Targets t(targets, x.R, x.C, ignore_index);
  CrossEntropyParams p = params_of(x, t, ignore_index, label_smoothing);
  Tensor loss = new_tensor({x.R}, ScalarType::Float), lse = new_tensor({x.R, 2}, ScalarType::Float), owner;
  p.loss = static_cast<float*>(loss.mutable_data_ptr()), p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (dloss) p.dloss = floats_of(kOp, "dloss", *dloss, x.R, &owner);
  p.dlogits = {logits.mutable_data_ptr(), x.stride, x.dtype};
  parallel(x.R, x.C * 16, [&](i64 begin, i64 end) {
    for (i64 r = begin; r < end; r++)
      cpu::kernels().cross_entropy_fwd(p, r, r + 1), cpu::kernels().cross_entropy_bwd(p, r, r + 1);
  });
  return loss;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("cross_entropy_fwd", GPTFAST_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", GPTFAST_BOX(&cross_entropy_bwd));
  m.impl("cross_entropy_in_place", GPTFAST_BOX(&cross_entropy_in_place));
}

}  // namespace gptfast
