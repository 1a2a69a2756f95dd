// grouped_gemm: products of many groups of rows, each with a matrix of its own; checks, workspace, launch.
//
// A thread packs the columns that it multiplies, and nobody waits for it: with a panel packed by all, as in gemm, each group is
// two launches, and half of its matrix comes from the other core's cache (docs/notes/cpu.md).
#include <algorithm>

#include "common.h"
#include "gemm_stretches.h"

namespace gptfast {
namespace {

constexpr const char* kOp = "grouped_gemm";
constexpr i64 kFewRows = 15;  // that read B where it lies

struct Group {
  i64 matrix, first, rows;
  bool as_it_lies;          // its matrix is read once, without packing
  i64 columns, first_item;  // of an item
};

// Columns of an item that reads B where it lies: the more, the longer the stretches of memory, but enough items for every thread.
i64 few_columns(i64 N, i64 groups) {
  const i64 wanted = 6 * i64(torch::stable::get_num_threads());
  i64 columns = kMostColumns;
  while (columns > 2 * kPanel && groups * ceil_div(N, columns) < wanted) columns /= 2;
  return columns;
}

// The groups that have `least` to `most` rows; *items: how many items they are.
std::vector<Group> groups_of(const cpu::GemmParams& p, const Tensor& offsets, i64 rows, i64 least, i64 most,
                             i64* items) {
  const i64* ends = static_cast<const int64_t*>(offsets.const_data_ptr());
  std::vector<Group> groups;
  i64 few = 0;
  for (i64 g = 0; g + 1 < offsets.numel(); g++) {
    GPTFAST_CHECK(ends[g] >= 0 && ends[g] <= ends[g + 1] && ends[g + 1] <= rows, kOp, ": offsets must rise from 0 to ",
                  rows, ", the rows of a");
    const i64 count = ends[g + 1] - ends[g];
    if (!count || count < least || count > most) continue;
    groups.push_back({g, ends[g], count, count <= kFewRows && p.b.by_columns, 0, 0});
    few += groups.back().as_it_lies;
  }
  *items = 0;
  for (Group& g : groups) {
    g.columns = g.as_it_lies ? few_columns(p.N, few) : packed_columns(p), g.first_item = *items;
    *items += ceil_div(p.N, g.columns);
  }
  return groups;
}

// Columns [p.n0, p.n1) of one group.
void multiply(cpu::GemmParams& p, bool as_it_lies) {
  if (!as_it_lies) return multiply_own_columns(p);
  p.packed = nullptr, p.carry = nullptr, p.k1 = words_of(p), p.columns = p.n1 - p.n0;
  cpu::kernels().gemm(p, 0);
}

// c[r] = a[r] b[g] (+ bias[g]) for the rows r of every group g of `least` to `most` rows, offsets[g] <= r < offsets[g + 1].
void grouped_gemm(const Tensor& a, const Tensor& offsets, const Tensor& b, const OptTensor& bias, Tensor c, bool pairs,
                  i64 least, i64 most) {
  GPTFAST_CHECK(by_rows(defined(a)) && by_rows(defined(c)) && on_cpu(b) && b.dim() == 3 && b.size(1) == a.size(1) &&
                    c.size(0) == a.size(0) && c.size(1) == b.size(2),
                kOp, ": expected a (M, K), b (G, K, N), c (M, N) on the CPU, a and c with contiguous rows");
  const i64 G = b.size(0), K = a.size(1), N = b.size(2);
  const bool by_columns = b.stride(1) == 1 || K <= 1;
  GPTFAST_CHECK(by_columns || b.stride(2) == 1 || N <= 1, kOp,
                ": the matrices of b must be contiguous along their rows or their columns");
  GPTFAST_CHECK(on_cpu(offsets) && offsets.dim() == 1 && offsets.numel() == G + 1 &&
                    offsets.scalar_type() == ScalarType::Long && offsets.stride(0) == 1,
                kOp, ": offsets must be ", G + 1, " int64 values on the CPU, contiguous");
  GPTFAST_CHECK(!bias || (on_cpu(*bias) && bias->dim() == 2 && bias->size(0) == G && bias->size(1) == N), kOp,
                ": bias must be (G, N) on the CPU");
  cpu::GemmParams p{};
  p.N = N, p.K = K, p.pairs = pairs && cpu::kernels().multiplies_pairs;
  p.b = {nullptr, b.stride(by_columns ? 2 : 1), dtype_of(kOp, b), by_columns};
  i64 items;
  const std::vector<Group> groups = groups_of(p, offsets, a.size(0), least, most, &items);
  Tensor carry, biases;
  if (words_of(p) > kMostDepth) carry = new_tensor({c.size(0), N}, ScalarType::Float);
  if (bias) biases = torch::stable::contiguous(*bias);
  const DType of_a = dtype_of(kOp, a), of_c = dtype_of(kOp, c), of_bias = bias ? dtype_of(kOp, biases) : DType::f32;
  const char *from = static_cast<const char*>(a.const_data_ptr()),
             *matrices = static_cast<const char*>(b.const_data_ptr());
  char* to = static_cast<char*>(c.mutable_data_ptr());
  const char* added = bias ? static_cast<const char*>(biases.const_data_ptr()) : nullptr;
  float* carried = carry.defined() ? static_cast<float*>(carry.mutable_data_ptr()) : nullptr;
  parallel_items(items, [&](i64 item) {
    const Group& g = *std::prev(
        std::upper_bound(groups.begin(), groups.end(), item, [](i64 i, const Group& x) { return i < x.first_item; }));
    cpu::GemmParams own = p;
    own.M = g.rows, own.n0 = (item - g.first_item) * g.columns, own.n1 = std::min(own.n0 + g.columns, N);
    own.a = {from + g.first * a.stride(0) * element_size(of_a), a.stride(0), of_a, false};
    own.b.data = matrices + g.matrix * b.stride(0) * element_size(p.b.dtype);
    own.c = {to + g.first * c.stride(0) * element_size(of_c), c.stride(0), of_c};
    own.bias = {added ? added + g.matrix * N * element_size(of_bias) : nullptr, of_bias};
    own.carry = carried ? carried + g.first * N : nullptr;
    multiply(own, g.as_it_lies);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) { m.impl("grouped_gemm", GPTFAST_BOX(&grouped_gemm)); }

}  // namespace gptfast
