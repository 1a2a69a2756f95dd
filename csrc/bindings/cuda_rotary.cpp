// rotary on CUDA: checks, allocation, launch.
#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "rotary";

const float* table_of(const char* name, const Tensor& table, const Tensor& x, Tensor* owner) {
  check_device(kOp, name, table, x);
  GPTFAST_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Float, kOp, ": ", name,
                " must be float32 of shape (positions, R/2)");
  *owner = contiguous(kOp, table);
  return floats(*owner);
}

// x (B, H, T, D) -> the same shape, stored as (B, T, H, D). Positions outside the tables are not looked at here, which would
// wait for the GPU: their tokens become nan.
Tensor rotary_op(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptTensor& positions, bool interleaved,
                 bool inverse) {
  check_device(kOp, "x", x, x);
  GPTFAST_CHECK(x.dim() == 4, kOp, ": x must have four dimensions, (B, H, T, D)");
  Tensor owners[4];
  RotaryParams p{};
  p.cos = table_of("cos", cos, x, &owners[0]), p.sin = table_of("sin", sin, x, &owners[1]);
  p.B = x.size(0), p.H = x.size(1), p.T = x.size(2), p.D = x.size(3), p.half = cos.size(1);
  const i64 rows = cos.size(0);
  GPTFAST_CHECK(2 * p.half <= p.D && sin.size(0) == rows && sin.size(1) == p.half, kOp, ": the tables have ", p.half,
                " columns and x ", p.D, " channels, or they differ in shape");
  GPTFAST_CHECK(p.T * p.H * p.D <= kMostRows, kOp, ": x has ", p.T, " positions of ", p.H, " heads of ", p.D,
                " channels; the CUDA kernel takes up to ", kMostRows, " values of a sequence: use backend='eager'");
  p.dtype = dtype_of(kOp, x), p.interleaved = interleaved, p.inverse = inverse;
  if (positions) {
    const i64 n = defined(*positions).numel();
    GPTFAST_CHECK(n == p.T || n == p.B * p.T, kOp, ": positions must be ", p.T, " or ", p.B * p.T, " int64 values");
    p.positions = indices_of(kOp, "positions", *positions, n, x, &owners[2]), p.position_stride = n == p.T ? 0 : p.T;
  } else {
    GPTFAST_CHECK(p.T <= rows, kOp, ": x has ", p.T, " positions but the tables ", rows, " rows");
  }
  const Launch on(x);
  owners[3] = x.stride(3) == 1 || p.D == 1 ? x : contiguous(kOp, x);
  const auto stride = [&](int d) {
    return x.size(d) > 1 ? owners[3].stride(d) : 0;
  };  // of one element it may be anything
  p.x = {owners[3].const_data_ptr(), stride(0), stride(1), stride(2)};
  Tensor y = new_tensor(kOp, x, {p.B, p.T, p.H, p.D}, x.scalar_type());
  p.y = {y.mutable_data_ptr(), p.T * p.H * p.D, p.D, p.H * p.D};
  check(kOp, rotary(p, rows, on.stream));
  return torch::stable::transpose(y, 1, 2);
}

}  // namespace

GPTFAST_CUDA_IMPL(m) { m.impl("rotary", GPTFAST_BOX(&rotary_op)); }

}  // namespace gptfast::cuda
