// A product by stretches of its second factor, which are packed into a workspace one after another.
#pragma once
#include <algorithm>

#include "common.h"

namespace gptfast {

// Whether x is a CPU matrix with contiguous rows, which do not overlap.
inline bool by_rows(const Tensor& x) {
  return on_cpu(x) && x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1) &&
         (x.size(0) <= 1 || x.stride(0) >= x.size(1));
}

constexpr i64 kPanel = cpu::kGemmPanel;
constexpr i64 kMostDepth = 4096;  // words of k in a stretch

// Words of k: a word is two values where they are multiplied in pairs.
inline i64 words_of(const cpu::GemmParams& p) { return p.pairs ? ceil_div(p.K, 2) : p.K; }

// Rows of the panels of a stretch.
inline i64 packed_depth(const cpu::GemmParams& p) {
  return ceil_div(std::max<i64>(1, std::min(words_of(p), kMostDepth)), cpu::kGemmDepth) * cpu::kGemmDepth;
}

// Columns of an item: enough items for every thread to end at about the same time.
inline i64 item_columns(const cpu::GemmParams& p) {
  const i64 wanted = 6 * i64(torch::stable::get_num_threads()), row_blocks = ceil_div(p.M, cpu::kGemmRows);
  i64 columns = 768;
  while (columns > 96 && row_blocks * ceil_div(p.n1 - p.n0, columns) < wanted) columns /= 2;
  return columns;
}

// Sets p's stretch, `packed`, `carry` and `columns`. width: columns of a stretch, whole panels. pack(item) packs a part of
// the stretch, product(item) multiplies one.
template <class Pack, class Product> void by_stretches(cpu::GemmParams& p, i64 width, Pack pack, Product product) {
  const i64 words = words_of(p);
  Tensor carry;
  if (words > kMostDepth) {
    carry = new_tensor({p.M, p.N}, ScalarType::Float);
    p.carry = static_cast<float*>(carry.mutable_data_ptr());
  }
  p.packed = static_cast<uint32_t*>(cpu::workspace(size_t(packed_depth(p) * width) * 4));
  for (p.n0 = 0; p.n0 < p.N; p.n0 += width)
    for (p.k0 = 0; p.k0 == 0 || p.k0 < words; p.k0 += kMostDepth) {
      p.n1 = std::min(p.n0 + width, p.N), p.k1 = std::min(p.k0 + kMostDepth, words);
      const i64 groups = ceil_div(p.n1 - p.n0, kPanel * cpu::kPackPanels);
      parallel_items(groups * ceil_div(p.k1 - p.k0, cpu::kGemmDepth), pack);
      p.columns = item_columns(p);
      parallel_items(ceil_div(p.M, cpu::kGemmRows) * ceil_div(p.n1 - p.n0, p.columns), product);
    }
}

// ---- items that pack the columns that they multiply, where these serve few rows: nobody waits for what others pack ------------

constexpr i64 kOwnWords = 1 << 16;  // of packed B of a thread, 256 KB: they stay in its L2
constexpr i64 kMostColumns = 256;   // of an item

inline i64 packed_columns(const cpu::GemmParams& p) {
  return std::clamp<i64>(kOwnWords / packed_depth(p) / kPanel * kPanel, kPanel, kMostColumns);
}
// All rows of columns [p.n0, p.n1).
inline void multiply_own_columns(cpu::GemmParams& p) {
  const auto& kernels = cpu::kernels();
  const i64 words = words_of(p);
  p.columns = p.n1 - p.n0;
  p.packed = static_cast<uint32_t*>(cpu::workspace(size_t(packed_depth(p) * ceil_div(p.columns, kPanel) * kPanel) * 4));
  for (p.k0 = 0; p.k0 == 0 || p.k0 < words; p.k0 += kMostDepth) {
    p.k1 = std::min(p.k0 + kMostDepth, words);
    const i64 parts = ceil_div(p.columns, kPanel * cpu::kPackPanels) * ceil_div(p.k1 - p.k0, cpu::kGemmDepth);
    kernels.gemm_pack(p, 0, parts);
    for (i64 item = 0; item < ceil_div(p.M, cpu::kGemmRows); item++) kernels.gemm(p, item);
  }
}

}  // namespace gptfast
