// dropout and dropout_mask: checks, allocation, launch.
#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "dropout";

Tensor dropout(const Tensor& x, double p, i64 seed, i64 offset) {
  const RowView v = rows_of(kOp, x);
  Tensor y = new_like(x);
  const DropoutRowsParams params{v.rows(), mut_rows(kOp, y, v.C), v.R, v.C, dropout_of_rows(p, seed, offset)};
  parallel(v.R, v.C * 8, [&](i64 begin, i64 end) { cpu::kernels().dropout(params, begin, end); });
  return y;
}

Tensor dropout_mask(i64 matrices, i64 rows, i64 cols, double p, i64 seed, i64 offset) {
  GPTFAST_CHECK(matrices >= 0 && rows >= 0 && cols >= 0, kOp, ": the mask has a negative size");
  Tensor keep = new_tensor({matrices, rows, cols}, ScalarType::Bool);
  const cpu::DropoutMaskParams params{static_cast<bool*>(keep.mutable_data_ptr()), rows, cols,
                                      dropout_of_rows(p, seed, offset)};
  parallel(matrices * rows, cols * 8, [&](i64 begin, i64 end) { cpu::kernels().dropout_mask(params, begin, end); });
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("dropout", GPTFAST_BOX(&dropout)); }
STABLE_TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) { m.impl("dropout_mask", GPTFAST_BOX(&dropout_mask)); }

}  // namespace gptfast
