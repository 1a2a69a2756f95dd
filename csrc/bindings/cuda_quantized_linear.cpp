// quantized_linear on CUDA: checks, allocation, launch.
#include "../cuda/quantized_linear.h"

#include <string>

#include "cuda_common.h"

namespace gptfast::cuda {
namespace {

constexpr const char* kOp = "quantized_linear";

struct Weight {
  PackedWeight w;
  Tensor codes, scales;  // keep copies alive
};
Weight weight_of(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::string& format, i64 group_size,
                 i64 K) {
  const bool bytes = format == "int8", mxfp4 = format == "mxfp4";
  GPTFAST_CHECK(bytes || mxfp4 || format == "int4" || format == "nf4", kOp, ": format is ", format,
                "; expected int8, int4, nf4 or mxfp4");
  GPTFAST_CHECK(group_size == 32 || (!mxfp4 && (group_size == 64 || group_size == 128)), kOp, ": group_size is ",
                group_size, mxfp4 ? "; mxfp4 has groups of 32" : "; expected 32, 64 or 128");
  check_device(kOp, "codes", codes, x);
  check_device(kOp, "scales", scales, x);
  GPTFAST_CHECK(codes.dim() == 2 && codes.scalar_type() == (bytes ? ScalarType::Char : ScalarType::Byte), kOp,
                ": codes must be a matrix of ", bytes ? "int8" : "uint8");
  GPTFAST_CHECK(K >= 0 && K <= kMostColumns && codes.size(0) <= kMostColumns, kOp, ": a weight of ", codes.size(0),
                " outputs and ", K, " features; expected 0 to ", kMostColumns);
  const i64 groups = (K + group_size - 1) / group_size, row_bytes = groups * group_size / (bytes ? 1 : 2);
  const i64 N = codes.size(0);
  GPTFAST_CHECK(codes.size(1) == row_bytes && scales.dim() == 2 && scales.size(0) == N && scales.size(1) == groups &&
                    (!mxfp4 || scales.scalar_type() == ScalarType::Byte),
                kOp, ": expected codes (", N, ", ", row_bytes, ") and scales (", N, ", ", groups, ")",
                mxfp4 ? " of uint8" : "", " for ", K, " features in ", format);
  Weight r{{}, contiguous(kOp, codes), contiguous(kOp, scales)};
  if (reinterpret_cast<uintptr_t>(r.codes.const_data_ptr()) % 16) r.codes = torch::stable::clone(r.codes);
  r.w = {static_cast<const uint8_t*>(r.codes.const_data_ptr()),
         r.scales.const_data_ptr(),
         mxfp4 ? DType::f32 : dtype_of(kOp, scales),
         bytes              ? Codes::int8
         : mxfp4            ? Codes::mxfp4
         : format == "int4" ? Codes::int4
                            : Codes::nf4,
         int(N),
         int(K),
         int(groups),
         group_size == 32   ? 5
         : group_size == 64 ? 6
                            : 7,
         row_bytes};
  return r;
}

void check_decoded(const OptTensor& nested_absmax, const OptTensor& offset) {
  GPTFAST_CHECK(!nested_absmax && !offset, kOp, ": doubly quantised scales are decoded before CUDA's kernels");
}

// x (M, C) in rows as QuantizedLinearParams has them; elsewhere a copy with zeros up to `columns`.
View whole_rows(const Tensor& x, i64 columns) {
  View v = view_of(kOp, x);
  const bool apart = v.R <= 1 || (v.stride >= v.C && v.stride * element_size(v.dtype) % 16 == 0);
  if (v.C == columns && apart && reinterpret_cast<uintptr_t>(v.owner.const_data_ptr()) % 16 == 0) return v;
  const i64 shape[] = {x.size(0), columns};
  Tensor copy = allocated(kOp, shape, [&] { return torch::stable::new_zeros(x, shape); });
  Tensor inside = torch::stable::narrow(copy, 1, 0, v.C);
  torch::stable::copy_(inside, x);
  v.owner = copy, v.stride = columns;
  return v;
}

Tensor fwd(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias, std::string format,
           i64 group_size, const OptTensor& nested_absmax, const OptTensor& offset) {
  check_decoded(nested_absmax, offset);
  GPTFAST_CHECK(defined(x).dim() == 2, kOp, ": expected x (M, K)");
  const Weight weight = weight_of(x, codes, scales, format, group_size, x.size(1));
  GPTFAST_CHECK(x.size(0) <= kMostRows, kOp, ": x has ", x.size(0), " rows; expected at most ", kMostRows);
  Tensor y = new_tensor(kOp, x, {x.size(0), weight.w.N}, x.scalar_type()), bias_owner;
  if (!y.numel()) return y;
  const Launch on(x);
  const View rows = whole_rows(x, row_columns(weight.w, false));
  QuantizedLinearParams p{
      rows.rows(),    weight.w, vector_of(kOp, "bias", bias, weight.w.N, x, &bias_owner), mut_rows(kOp, y, weight.w.N),
      int(x.size(0)), false};
  check(kOp, quantized_linear(p, on.stream));
  return y;
}
Tensor bwd(const Tensor& dy, const Tensor& codes, const Tensor& scales, std::string format, i64 group_size,
           i64 in_features, const OptTensor& nested_absmax, const OptTensor& offset) {
  check_decoded(nested_absmax, offset);
  GPTFAST_CHECK(defined(dy).dim() == 2, kOp, ": expected dy (M, N)");
  const Weight weight = weight_of(dy, codes, scales, format, group_size, in_features);
  GPTFAST_CHECK(dy.size(1) == weight.w.N, kOp, ": dy has ", dy.size(1), " columns; expected ", weight.w.N);
  GPTFAST_CHECK(dy.size(0) <= kMostRows, kOp, ": dy has ", dy.size(0), " rows; expected at most ", kMostRows);
  Tensor dx = new_tensor(kOp, dy, {dy.size(0), in_features}, dy.scalar_type());
  if (!dx.numel()) return dx;
  const Launch on(dy);
  const View rows = whole_rows(dy, row_columns(weight.w, true));
  const QuantizedLinearParams p{rows.rows(),     weight.w, {nullptr, DType::f32}, mut_rows(kOp, dx, in_features),
                                int(dy.size(0)), true};
  check(kOp, quantized_linear(p, on.stream));
  return dx;
}

}  // namespace

GPTFAST_CUDA_IMPL(m) {
  m.impl("quantized_linear_fwd", GPTFAST_BOX(&fwd));
  m.impl("quantized_linear_bwd", GPTFAST_BOX(&bwd));
}

}  // namespace gptfast::cuda
