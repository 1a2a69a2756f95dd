// gemm: checks, workspace, launch.
#include <algorithm>

#include "common.h"
#include "gemm_stretches.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "gemm";
constexpr i64 kWorkspace = 4 << 20;  // words of packed B at a time, 16 MB

// Strides of a dimension of one element mean nothing: such a matrix counts as stored either way.
cpu::Matrix matrix_of(const char* name, const Tensor& x) {
  GPTFAST_CHECK(on_cpu(x) && x.dim() == 2, kOp, ": ", name, " must be a CPU matrix");
  const bool by_columns = x.stride(0) == 1 || x.size(0) <= 1, by_rows = x.stride(1) == 1 || x.size(1) <= 1;
  GPTFAST_CHECK(by_rows || by_columns, kOp, ": ", name, " must be contiguous along its rows or its columns");
  return {x.const_data_ptr(), x.stride(by_columns ? 1 : 0), dtype_of(kOp, x), by_columns};
}

// Whether columns serve so few rows that each item rather packs its own; the bits are the same.
bool packs_own(const cpu::GemmParams& p) {
  const bool read_in_place = !p.a.by_columns && p.a.dtype == (p.pairs ? DType::bf16 : DType::f32);
  return read_in_place && p.b.by_columns && p.K > cpu::kMostFew && words_of(p) <= kMostDepth &&
         p.M <= 6 * cpu::kGemmRows && ceil_div(p.N, packed_columns(p)) >= 6 * i64(torch::stable::get_num_threads());
}

void multiply(cpu::GemmParams& p) {
  if (!p.M || !p.N) return;
  if (packs_own(p)) {
    const i64 columns = packed_columns(p);
    return parallel_items(ceil_div(p.N, columns), [&](i64 item) {
      cpu::GemmParams own = p;
      own.n0 = item * columns, own.n1 = std::min(own.n0 + columns, p.N);
      multiply_own_columns(own);
    });
  }
  const i64 width = std::min<i64>(ceil_div(p.N, kPanel), kWorkspace / packed_depth(p) / kPanel) * kPanel;
  by_stretches(
      p, width, [&](i64 item) { cpu::kernels().gemm_pack(p, item, item + 1); },
      [&](i64 item) { cpu::kernels().gemm(p, item); });
}

void gemm(const Tensor& a, const Tensor& b, const OptTensor& bias, Tensor c, bool pairs, bool accumulate,
          const OptTensor& a_sums) {
  GPTFAST_CHECK(defined(a).dim() == 2 && defined(b).dim() == 2 && defined(c).dim() == 2 && a.size(1) == b.size(0) &&
                    c.size(0) == a.size(0) && c.size(1) == b.size(1) && on_cpu(c) &&
                    (c.size(1) <= 1 || c.stride(1) == 1) && (c.size(0) <= 1 || c.stride(0) >= c.size(1)),
                kOp, ": expected a (M, K), b (K, N), c (M, N) with contiguous rows");
  Tensor bias_owner;
  cpu::GemmParams p{};
  p.a = matrix_of("a", a), p.b = matrix_of("b", b), p.c = {c.mutable_data_ptr(), c.stride(0), dtype_of(kOp, c)};
  p.M = a.size(0), p.N = b.size(1), p.K = a.size(1);
  p.pairs = pairs && cpu::kernels().multiplies_pairs, p.accumulate = accumulate;
  p.bias = vector_of(kOp, bias, p.N, &bias_owner);
  if (a_sums) {
    Tensor sums = *a_sums;
    GPTFAST_CHECK(p.a.by_columns && on_cpu(sums) && sums.dim() == 1 && sums.size(0) == p.M &&
                      (p.M <= 1 || sums.stride(0) == 1) && sums.scalar_type() == ScalarType::Float,
                  kOp, ": a_sums must be (M,) float32, contiguous, with a by columns");
    p.a_sums = static_cast<float*>(sums.mutable_data_ptr());
  }
  multiply(p);
}

// c = a^T b for an `a` of few columns.
void gemm_few(const Tensor& a, const Tensor& b, Tensor c) {
  GPTFAST_CHECK(by_rows(defined(a)) && by_rows(defined(b)) && by_rows(defined(c)) && a.size(0) == b.size(0) &&
                    c.size(0) == a.size(1) && c.size(1) == b.size(1),
                kOp, "_few: expected a (K, M), b (K, N), c (M, N) with contiguous rows");
  const i64 M = a.size(1), N = b.size(1), K = a.size(0);
  const MutRows to{c.mutable_data_ptr(), c.stride(0), dtype_of(kOp, c)};
  const DType of_a = dtype_of(kOp, a), of_b = dtype_of(kOp, b);
  const auto& kernels = cpu::kernels();
  if (!kernels.gemm_few || of_b != DType::bf16 || M > cpu::kMostFew) {
    cpu::GemmParams p{};
    p.a = {a.const_data_ptr(), a.stride(0), of_a, true}, p.b = {b.const_data_ptr(), b.stride(0), of_b, false}, p.c = to;
    p.M = M, p.N = N, p.K = K, p.pairs = of_b == DType::bf16 && kernels.multiplies_pairs;
    return multiply(p);
  }
  if (!M || !N) return;
  cpu::GemmFewParams p{
      {a.const_data_ptr(), a.stride(0), of_a}, {b.const_data_ptr(), b.stride(0), of_b}, to, M, N, K, nullptr};
  p.packed = static_cast<uint32_t*>(cpu::workspace(size_t(ceil_div(K, 2) * cpu::kMostFew) * 4));
  kernels.gemm_few_pack(p);
  parallel_items(ceil_div(N, cpu::kFewColumns), [&](i64 item) { kernels.gemm_few(p, item); });
}

// c = a b for a `b` of few columns and an `a` of bf16.
void gemm_narrow(const Tensor& a, const Tensor& b, Tensor c) {
  GPTFAST_CHECK(by_rows(defined(a)) && by_rows(defined(c)) && defined(b).dim() == 2 && a.size(1) == b.size(0) &&
                    c.size(0) == a.size(0) && c.size(1) == b.size(1) && c.scalar_type() == ScalarType::Float,
                kOp, "_narrow: expected a (M, K), b (K, N), c (M, N) float32, a and c with contiguous rows");
  const i64 M = a.size(0), N = b.size(1), K = a.size(1);
  const auto& kernels = cpu::kernels();
  if (!kernels.gemm_narrow || dtype_of(kOp, a) != DType::bf16 || N > cpu::kMostFew) {
    const bool pairs = dtype_of(kOp, a) == DType::bf16;
    return gemm(a, b, OptTensor(), c, pairs, false, OptTensor());
  }
  if (!M || !N) return;
  cpu::GemmNarrowParams p{{a.const_data_ptr(), a.stride(0), DType::bf16},
                          matrix_of("b", b),
                          static_cast<float*>(c.mutable_data_ptr()),
                          c.stride(0),
                          N,
                          K,
                          nullptr};
  p.packed = static_cast<uint16_t*>(cpu::workspace(size_t(cpu::narrow_values(N, K)) * 2));
  kernels.gemm_narrow_pack(p);
  parallel(M, K * 2, [&](i64 begin, i64 end) { kernels.gemm_narrow(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("gemm", GPTFAST_BOX(&gemm));
  m.impl("gemm_few", GPTFAST_BOX(&gemm_few));
  m.impl("gemm_narrow", GPTFAST_BOX(&gemm_narrow));
}

}  // namespace gptfast
