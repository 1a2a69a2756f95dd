// rotary: checks, allocation, launch.
#include "common.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "rotary";

// positions (T), (1, T) or (B, T), int64, all of them rows of the tables; *owner keeps a copy alive.
void set_positions(RotaryParams& p, const Tensor& positions, i64 rows, Tensor* owner) {
  const i64 n = defined(positions).numel();
  GPTFAST_CHECK(on_cpu(positions) && positions.scalar_type() == ScalarType::Long && (n == p.T || n == p.B * p.T), kOp,
                ": positions must be ", p.T, " or ", p.B * p.T, " int64 values on the CPU");
  *owner = torch::stable::contiguous(positions);
  p.positions = static_cast<const int64_t*>(owner->const_data_ptr()), p.position_stride = n == p.T ? 0 : p.T;
  for (i64 k = 0; k < n; k++)
    GPTFAST_CHECK(p.positions[k] >= 0 && p.positions[k] < rows, kOp, ": positions holds ", p.positions[k],
                  "; expected 0 to ", rows - 1);
}

// x (B, H, T, D) -> the same shape, stored as (B, T, H, D).
Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
              bool inverse) {
  GPTFAST_CHECK(on_cpu(x) && x.dim() == 4, kOp, ": x must be a CPU tensor (B, H, T, D)");
  GPTFAST_CHECK(on_cpu(cos) && on_cpu(sin) && cos.dim() == 2 && sin.dim() == 2, kOp,
                ": cos and sin must be CPU tensors (positions, R/2)");
  RotaryParams p{};
  p.B = x.size(0), p.H = x.size(1), p.T = x.size(2), p.D = x.size(3), p.half = cos.size(1);
  const i64 rows = cos.size(0);
  GPTFAST_CHECK(2 * p.half <= p.D && sin.size(0) == rows, kOp, ": the tables have ", p.half, " columns and x ", p.D,
                " channels, or they differ in length");
  p.dtype = dtype_of(kOp, x), p.interleaved = interleaved, p.inverse = inverse;
  Tensor owners[4];
  p.cos = floats_of(kOp, "cos", cos, rows * p.half, &owners[0]);
  p.sin = floats_of(kOp, "sin", sin, rows * p.half, &owners[1]);
  if (positions) set_positions(p, *positions, rows, &owners[2]);
  else GPTFAST_CHECK(p.T <= rows, kOp, ": x has ", p.T, " positions but the tables ", rows, " rows");
  owners[3] = x.stride(3) == 1 || p.D == 1 ? x : torch::stable::contiguous(x);
  p.x = {owners[3].const_data_ptr(), owners[3].stride(0), owners[3].stride(1), owners[3].stride(2)};
  Tensor y = new_tensor({p.B, p.T, p.H, p.D}, x.scalar_type());
  const bool lines = p.half * element_size(p.dtype) % 64 == 0;  // each half of a row then begins a cache line
  p.non_temporal = mut_rows(kOp, y, p.D).non_temporal && lines;
  p.y = {y.mutable_data_ptr(), p.T * p.H * p.D, p.D, p.H * p.D};
  parallel(p.B * p.T, p.H * p.D * 8, [&](i64 begin, i64 end) { cpu::kernels().rotary(p, begin, end); });
  return torch::stable::transpose(y, 1, 2);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("rotary", GPTFAST_BOX(&rotary)); }

}  // namespace gptfast
