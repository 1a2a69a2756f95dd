// sample on CUDA: checks, allocation, launch.
#include "../cuda/sample_parts.h"
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "sample";

// Waits for the tokens and reports rows that had none. Under graph capture nobody may wait: there the codes stay.
void check_tokens(const Tensor& out) {
  const Tensor host = torch::stable::to(out, torch::stable::Device(torch::stable::DeviceType::CPU));
  const i64* tokens = static_cast<const i64*>(host.const_data_ptr());
  for (i64 r = 0; r < host.numel(); r++) {
    GPTFAST_CHECK(tokens[r] != -1, kOp, ": logits[", r, "] holds nan - look for an overflow in the model");
    GPTFAST_CHECK(tokens[r] != -2, kOp, ": logits[", r, "] holds nothing but -inf; no token is left to draw");
    GPTFAST_CHECK(tokens[r] != -3, kOp, ": options[", r, "] are out of range: make them with row_options");
  }
}

// each: the options of every row, or null for `all`.
Tensor draw(const Tensor& logits, const SampleOptions& all, const Tensor* each, const Tensor& position,
            const Tensor& stream) {
  GPTFAST_CHECK(defined(logits).dim() == 2, kOp, ": logits must be (B, V)");
  const View x = view_of(kOp, logits);
  constexpr i64 kMostTokens = i64(1) << 21;
  GPTFAST_CHECK(x.C > 0 || !x.R, kOp, ": logits has an empty vocabulary");
  GPTFAST_CHECK(x.C < kMostTokens, kOp, ": logits has ", x.C, " tokens a row; the CUDA kernel takes fewer than ",
                kMostTokens, ": use backend='eager'");
  const Launch on(logits);
  Tensor position_owner, stream_owner, options_owner, out = new_tensor(kOp, logits, {x.R}, ScalarType::Long);
  const i64* options = each ? indices_of(kOp, "options", *each, 4 * x.R, logits, &options_owner) : nullptr;
  const SampleParams p{.logits = x.rows(),
                       .position = indices_of(kOp, "position", position, x.R, logits, &position_owner),
                       .stream = indices_of(kOp, "stream", stream, x.R, logits, &stream_owner),
                       .each = reinterpret_cast<const SampleOptions*>(options),
                       .out = static_cast<i64*>(out.mutable_data_ptr()),
                       .R = x.R,
                       .V = x.C,
                       .all = all};
  const i64 bytes = sample_parts_room(p);
  Tensor room = new_tensor(kOp, logits, {bytes / i64(sizeof(float))}, ScalarType::Float);
  check(kOp, bytes ? sample_parts(p, room.mutable_data_ptr(), on.stream) : sample(p, on.stream));
  if (!on.capturing()) check_tokens(out);
  return out;
}

Tensor sample_all(const Tensor& logits, double temperature, i64 top_k, double top_p, i64 seed, const Tensor& position,
                  const Tensor& stream) {
  check_sampling(kOp, temperature, top_k, top_p);
  return draw(logits, {temperature, top_k, top_p, uint64_t(seed)}, nullptr, position, stream);
}

Tensor sample_rows(const Tensor& logits, const Tensor& options, const Tensor& position, const Tensor& stream) {
  check_row_options(kOp, logits, options);
  return draw(logits, {}, &options, position, stream);
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("sample", GPTFAST_BOX(&sample_all));
  m.impl("sample_rows", GPTFAST_BOX(&sample_rows));
}

}  // namespace gptfast::cuda
