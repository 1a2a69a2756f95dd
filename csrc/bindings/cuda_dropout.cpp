// dropout on CUDA: allocation, launch.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "dropout";

Tensor rows(const Tensor& x, double p, i64 seed, i64 offset) {
  const View v = view_of(kOp, x);
  Tensor y = new_like(kOp, x);
  const Launch on(x);
  check(kOp, dropout({v.rows(), mut_rows(kOp, y, v.C), v.R, v.C, dropout_of_rows(p, seed, offset)}, on.stream));
  return y;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) { m.impl("dropout", GPTFAST_BOX(&rows)); }

}  // namespace gptfast::cuda
