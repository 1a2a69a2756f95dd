// quantized_linear: checks, workspace, launch.
#include <algorithm>
#include <string>

#include "common.h"
#include "gemm_stretches.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "quantized_linear";
constexpr i64 kWorkspace = 1 << 20;  // words of decoded weights at a time, 4 MB

struct Weight {
  cpu::QuantizedMatrix w;
  Tensor codes, scales, nested;  // keep copies alive
};
Weight weight_of(const Tensor& codes, const Tensor& scales, const std::string& format, i64 group_size, i64 K,
                 const OptTensor& nested, const OptTensor& offset) {
  const bool bytes = format == "int8", mxfp4 = format == "mxfp4";
  GPTFAST_CHECK(bytes || mxfp4 || format == "int4" || format == "nf4", kOp, ": format is ", format,
                "; expected int8, int4, nf4 or mxfp4");
  GPTFAST_CHECK(group_size == 32 || (!mxfp4 && (group_size == 64 || group_size == 128)), kOp, ": group_size is ",
                group_size, mxfp4 ? "; mxfp4 has groups of 32" : "; expected 32, 64 or 128");
  GPTFAST_CHECK(nested.has_value() == offset.has_value() && (!nested || format == "nf4"), kOp,
                ": nested_absmax and offset go together, with format nf4");
  const bool byte_scales = mxfp4 || nested;
  GPTFAST_CHECK(
      on_cpu(codes) && codes.dim() == 2 && codes.scalar_type() == (bytes ? ScalarType::Char : ScalarType::Byte), kOp,
      ": codes must be a CPU matrix of ", bytes ? "int8" : "uint8");
  GPTFAST_CHECK(K >= 0 && K < (i64(1) << 40), kOp, ": ", K, " features");
  const i64 groups = ceil_div(K, group_size), row_bytes = groups * group_size / (bytes ? 1 : 2), N = codes.size(0);
  GPTFAST_CHECK(codes.size(1) == row_bytes && on_cpu(scales) && scales.dim() == 2 && scales.size(0) == N &&
                    scales.size(1) == groups && (!byte_scales || scales.scalar_type() == ScalarType::Byte),
                kOp, ": expected codes (", N, ", ", row_bytes, ") and scales (", N, ", ", groups, ")",
                byte_scales ? " of uint8" : "", " for ", K, " features in ", format);
  Weight r{{}, dense(codes), dense(scales), {}};
  r.w = {static_cast<const uint8_t*>(r.codes.const_data_ptr()),
         row_bytes,
         {r.scales.const_data_ptr(), groups, byte_scales ? DType::f32 : dtype_of(kOp, scales)},
         N,
         K,
         group_size,
         bytes              ? cpu::Codes::int8
         : mxfp4            ? cpu::Codes::mxfp4
         : format == "int4" ? cpu::Codes::int4
                            : cpu::Codes::nf4};
  if (nested) {
    Tensor one;
    r.w.offset = *floats_of(kOp, "offset", *offset, 1, &one);
    r.w.nested = floats_of(kOp, "nested_absmax", *nested, ceil_div(N * groups, cpu::kNestedBlock), &r.nested);
  }
  return r;
}

// C = A W^T (+ bias), or A W; by stretches of decoded weights.
void multiply(const Weight& weight, const RowView& a, Tensor& c, const Vector& bias, bool transposed) {
  cpu::QuantizedPackParams q{weight.w, {}, transposed};
  cpu::GemmParams& p = q.gemm;
  p.a = {a.owner.const_data_ptr(), a.stride, a.dtype, false};
  p.c = {c.mutable_data_ptr(), c.size(1), dtype_of(kOp, c)};
  p.M = c.size(0), p.K = a.C, p.N = c.size(1), p.bias = bias;
  p.pairs = a.dtype == DType::bf16 && cpu::kernels().multiplies_pairs;
  const i64 room = kWorkspace / packed_depth(p) / kPanel, panels = ceil_div(p.N, kPanel);
  const i64 width = ceil_div(panels, ceil_div(panels, room)) * kPanel;
  by_stretches(
      p, width, [&](i64 item) { cpu::kernels().quantized_pack(q, item); },
      [&](i64 item) { cpu::kernels().gemm(p, item); });
}
void multiply_few(const Weight& weight, const RowView& x, Tensor& y, const Vector& bias) {
  cpu::QuantizedRowsParams p{weight.w, x.rows(), bias, mut_rows(kOp, y, weight.w.N), y.size(0), nullptr};
  const i64 depth = ceil_div(p.w.K, cpu::kChunkCodes) * cpu::kChunkCodes;
  p.spread = static_cast<float*>(cpu::workspace(size_t(p.M * depth) * 4));
  cpu::kernels().quantized_spread(p);
  parallel(ceil_div(p.w.N, cpu::kQuantizedRows), cpu::kQuantizedRows * p.w.row_bytes * p.M, [&](i64 begin, i64 end) {
    for (i64 item = begin; item < end; item++) cpu::kernels().quantized_rows(p, item);
  });
}

Tensor quantized_linear_fwd(const Tensor& x, const Tensor& codes, const Tensor& scales, const OptTensor& bias,
                            std::string format, i64 group_size, const OptTensor& nested_absmax,
                            const OptTensor& offset) {
  GPTFAST_CHECK(defined(x).dim() == 2, kOp, ": expected x (M, K)");
  const Weight weight = weight_of(codes, scales, format, group_size, x.size(1), nested_absmax, offset);
  const RowView rows = rows_of(kOp, x);
  Tensor y = new_tensor({x.size(0), weight.w.N}, x.scalar_type()), bias_owner;
  const Vector added = vector_of(kOp, bias, weight.w.N, &bias_owner);
  if (!y.numel()) return y;
  if (x.size(0) <= cpu::kFewRows) multiply_few(weight, rows, y, added);
  else multiply(weight, rows, y, added, true);
  return y;
}
Tensor quantized_linear_bwd(const Tensor& dy, const Tensor& codes, const Tensor& scales, std::string format,
                            i64 group_size, i64 in_features, const OptTensor& nested_absmax, const OptTensor& offset) {
  GPTFAST_CHECK(defined(dy).dim() == 2, kOp, ": expected dy (M, N)");
  const Weight weight = weight_of(codes, scales, format, group_size, in_features, nested_absmax, offset);
  GPTFAST_CHECK(dy.size(1) == weight.w.N, kOp, ": dy has ", dy.size(1), " columns; expected ", weight.w.N);
  const RowView rows = rows_of(kOp, dy);
  Tensor dx = new_tensor({dy.size(0), in_features}, dy.scalar_type());
  if (dx.numel()) multiply(weight, rows, dx, {nullptr, DType::f32}, false);
  return dx;
}

Tensor quantized_decode(const Tensor& codes, const Tensor& scales, std::string format, i64 group_size, i64 in_features,
                        i64 first, i64 last) {
  const Weight weight = weight_of(codes, scales, format, group_size, in_features, std::nullopt, std::nullopt);
  GPTFAST_CHECK(0 <= first && first <= last && last <= in_features && first % group_size == 0, kOp, ": columns ", first,
                " to ", last, " of ", in_features, "; expected a range that begins with a group of ", group_size);
  Tensor out = new_tensor({weight.w.N, last - first}, ScalarType::BFloat16);
  const cpu::QuantizedDecodeParams p{weight.w, first, last, static_cast<uint16_t*>(out.mutable_data_ptr())};
  parallel(out.numel() ? weight.w.N : 0, 4 * (last - first),
           [&](i64 begin, i64 end) { cpu::kernels().quantized_decode(p, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("quantized_linear_fwd", GPTFAST_BOX(&quantized_linear_fwd));
  m.impl("quantized_linear_bwd", GPTFAST_BOX(&quantized_linear_bwd));
  m.impl("quantized_decode", GPTFAST_BOX(&quantized_decode));
}

}  // namespace gptfast
