// What the attention kernels for Hopper share on the host: which calls TMA can serve, and its maps.
#pragma once
#include "causal_attention_tile.cuh"
#include "wgmma.cuh"

namespace gptfast::cuda {

// x (B, H, rows, D) as a map of tiles of 64 columns and `tile_rows` rows; a dimension of one element has no stride to
// speak of.
template <class H> bool map_of(CUtensorMap* map, const AttentionParams& p, const H& x, int rows, int tile_rows) {
  const uint64_t row = uint64_t(p.D) * 2;
  auto stride = [&](i64 elements, int size) { return size == 1 ? row : uint64_t(elements) * 2; };
  const TensorShape shape{x.data,
                          {uint64_t(p.D), uint64_t(rows), uint64_t(p.H), uint64_t(p.B)},
                          {stride(x.st, rows), stride(x.sh, p.H), stride(x.sb, p.B)},
                          p.dtype};
  return tensor_map(map, shape, uint32_t(tile_rows));
}
inline bool has_map(const AttentionParams& p, const Heads& x, int rows) {  // TMA has no stride 0, as of expanded tensors
  auto fits = [](i64 stride, i64 size) { return size == 1 || (stride > 0 && stride < i64(1) << 39); };
  return fits(x.st, rows) && fits(x.sh, p.H) && fits(x.sb, p.B);
}
// 16 bits, a head dim with a kernel, and a Hopper GPU with so much shared memory a block.
inline bool on_hopper(const AttentionParams& p, int smem) {
  if (p.dtype == DType::f32 || (p.D != 64 && p.D != 128) || !p.whole_chunks || !p.T || !p.S) return false;
  int device = 0, major = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9 &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && most >= smem;
}

}  // namespace gptfast::cuda
