// sample on CUDA: checks, allocation, launch.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "sample";

// Waits for the tokens and reports rows that had none. Under graph capture nobody may wait: there -1 and -2 stay.
void check_tokens(const Tensor& out) {
  const Tensor host = torch::stable::to(out, torch::stable::Device(torch::stable::DeviceType::CPU));
  const i64* tokens = static_cast<const i64*>(host.const_data_ptr());
  for (i64 r = 0; r < host.numel(); r++) {
    GPTFAST_CHECK(tokens[r] != -1, kOp, ": logits[", r, "] holds nan - look for an overflow in the model");
    GPTFAST_CHECK(tokens[r] != -2, kOp, ": logits[", r, "] holds nothing but -inf; no token is left to draw");
  }
}

Tensor draw(const Tensor& logits, double temperature, i64 top_k, double top_p, i64 seed, const Tensor& position,
            const Tensor& stream) {
  GPTFAST_CHECK(defined(logits).dim() == 2, kOp, ": logits must be (B, V)");
  check_sampling(kOp, temperature, top_k, top_p);
  const View x = view_of(kOp, logits);
  constexpr i64 kMostTokens = i64(1) << 21;
  GPTFAST_CHECK(x.C > 0 || !x.R, kOp, ": logits has an empty vocabulary");
  GPTFAST_CHECK(x.C < kMostTokens, kOp, ": logits has ", x.C, " tokens a row; the CUDA kernel takes fewer than ",
                kMostTokens, ": use backend='eager'");
  const Launch on(logits);
  Tensor position_owner, stream_owner, out = new_tensor(kOp, logits, {x.R}, ScalarType::Long);
  const SampleParams p{x.rows(),
                       indices_of(kOp, "position", position, x.R, logits, &position_owner),
                       indices_of(kOp, "stream", stream, x.R, logits, &stream_owner),
                       static_cast<i64*>(out.mutable_data_ptr()),
                       x.R,
                       x.C,
                       top_k,
                       float(temperature),
                       top_p,
                       uint64_t(seed)};
  check(kOp, sample(p, on.stream));
  if (!on.capturing()) check_tokens(out);
  return out;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) { m.impl("sample", TORCH_BOX(&draw)); }

}  // namespace gptfast::cuda
