// sample: checks, allocation, launch.
#include "common.h"

namespace gptfast {
namespace {
constexpr const char* kOp = "sample";

Tensor draw(const Tensor& logits, const SampleOptions& all, const SampleOptions* each, const Tensor& position,
            const Tensor& stream) {
  GPTFAST_CHECK(defined(logits).dim() == 2, kOp, ": logits must be (B, V)");
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
                       .each = each,
                       .out = tokens,
                       .R = x.R,
                       .V = x.C,
                       .all = all};
  GPTFAST_CHECK(x.C > 0 || !x.R, kOp, ": logits has an empty vocabulary");
  parallel_items(x.R, [&](i64 r) { cpu::kernels().sample(p, r, r + 1); });
  for (i64 r = 0; r < x.R; r++) {
    GPTFAST_CHECK(tokens[r] != -1, kOp, ": logits[", r, "] holds nan - look for an overflow in the model");
    GPTFAST_CHECK(tokens[r] != -2, kOp, ": logits[", r, "] holds nothing but -inf; no token is left to draw");
  }
  return out;
}

Tensor sample(const Tensor& logits, double temperature, i64 top_k, double top_p, i64 seed, const Tensor& position,
              const Tensor& stream) {
  check_sampling(kOp, temperature, top_k, top_p);
  return draw(logits, {temperature, top_k, top_p, uint64_t(seed)}, nullptr, position, stream);
}

Tensor sample_rows(const Tensor& logits, const Tensor& options, const Tensor& position, const Tensor& stream) {
  GPTFAST_CHECK(on_cpu(options), kOp, ": options must be on the CPU");
  check_row_options(kOp, logits, options);
  const Tensor rows = torch::stable::contiguous(options);
  const auto* each = static_cast<const SampleOptions*>(rows.const_data_ptr());
  for (i64 r = 0; r < rows.size(0); r++) check_sampling(kOp, each[r].temperature, each[r].top_k, each[r].top_p);
  return draw(logits, {}, each, position, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("sample", GPTFAST_BOX(&sample));
  m.impl("sample_rows", GPTFAST_BOX(&sample_rows));
}

}  // namespace gptfast
