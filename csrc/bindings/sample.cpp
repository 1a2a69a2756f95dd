// sample: checks, allocation, launch.
#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "sample";

Tensor sample(const Tensor& logits, double temperature, i64 top_k, double top_p, i64 seed, const Tensor& position,
              const Tensor& stream) {
  GPTFAST_CHECK(defined(logits).dim() == 2, kOp, ": logits must be (B, V)");
  check_sampling(kOp, temperature, top_k, top_p);
  const RowView x = rows_of(kOp, logits);
  const Tensor pos = torch::stable::contiguous(defined(position)), str = torch::stable::contiguous(defined(stream));
  GPTFAST_CHECK(on_cpu(pos) && on_cpu(str) && pos.scalar_type() == ScalarType::Long &&
                    str.scalar_type() == ScalarType::Long && pos.numel() == x.R && str.numel() == x.R,
                kOp, ": position and stream must be int64 with one value per row");
  Tensor out = new_tensor({x.R}, ScalarType::Long);
  i64* tokens = static_cast<i64*>(out.mutable_data_ptr());
  const SampleParams p{.logits = x.rows(),
                       .position = static_cast<const i64*>(pos.const_data_ptr()),
                       .stream = static_cast<const i64*>(str.const_data_ptr()),
                       .out = tokens,
                       .R = x.R,
                       .V = x.C,
                       .top_k = top_k,
                       .temperature = float(temperature),
                       .top_p = top_p,
                       .seed = uint64_t(seed)};
  GPTFAST_CHECK(x.C > 0 || !x.R, kOp, ": logits has an empty vocabulary");
  parallel_items(x.R, [&](i64 r) { cpu::kernels().sample(p, r, r + 1); });
  for (i64 r = 0; r < x.R; r++) {
    GPTFAST_CHECK(tokens[r] != -1, kOp, ": logits[", r, "] holds nan - look for an overflow in the model");
    GPTFAST_CHECK(tokens[r] != -2, kOp, ": logits[", r, "] holds nothing but -inf; no token is left to draw");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace gptfast
