// What the attention kernels for Hopper share on the host: which calls TMA can serve, and its maps.
#pragma once
#include <atomic>

#include "causal_attention_tile.cuh"
#include "wgmma.cuh"

namespace gptfast::cuda {

// x (B, heads, rows, D) as a map of tiles of 64 columns and `tile_rows` rows; a dimension of one element has no stride to
// speak of.
template <class H>
bool map_of(CUtensorMap* map, const AttentionParams& p, const H& x, int heads, int rows, int tile_rows) {
  const uint64_t row = uint64_t(p.D) * 2;
  auto stride = [&](i64 elements, int size) { return size == 1 ? row : uint64_t(elements) * 2; };
  const TensorShape shape{x.data,
                          {uint64_t(p.D), uint64_t(rows), uint64_t(heads), uint64_t(p.B)},
                          {stride(x.st, rows), stride(x.sh, heads), stride(x.sb, p.B)},
                          p.dtype};
  return tensor_map(map, shape, uint32_t(tile_rows));
}
// TMA has no stride 0, as of expanded tensors.
inline bool has_map(const AttentionParams& p, const Heads& x, int heads, int rows) {
  auto fits = [](i64 stride, i64 size) { return size == 1 || (stride > 0 && stride < i64(1) << 39); };
  return fits(x.st, rows) && fits(x.sh, heads) && fits(x.sb, p.B);
}
// 16 bits and a head dim with a kernel.
inline bool has_hopper_shape(const AttentionParams& p) {
  return p.dtype != DType::f32 && (p.D == 64 || p.D == 128) && p.whole_chunks && p.T && p.S;
}

// The GPUs that can run a kernel: of Hopper, with so much shared memory a block, and with a body in the code that this
// library has for them. Where that was compiled for 9.0 without the "a", or from older PTX, it has none (HOPPER_BOUNDS).
class HopperGpus {
 public:
  template <class... P>
  HopperGpus(void (*kernel)(P...), int threads, int smem)
      : kernel_(reinterpret_cast<const void*>(kernel)), threads_(threads), smem_(smem) {}

  bool has_current() {
    int device = 0, major = 0, most = 0;
    return cleared(cudaGetDevice(&device)) == cudaSuccess &&
           cleared(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) == cudaSuccess &&
           major == 9 &&
           cleared(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) == cudaSuccess &&
           most >= smem_ && has_body(device);
  }

 private:
  bool has_body(int device) {  // asked once: it takes longer than the attributes of a device
    if (device < kDevices && answers_[device]) return answers_[device] > 0;
    cudaFuncAttributes attributes{};
    if (cleared(cudaFuncGetAttributes(&attributes, kernel_)) != cudaSuccess) return false;
    const bool found = attributes.maxThreadsPerBlock >= threads_;
    if (device < kDevices) answers_[device] = found ? 1 : -1;
    return found;
  }

  static constexpr int kDevices = 64;
  const void* kernel_;
  int threads_, smem_;
  std::atomic<signed char> answers_[kDevices] = {};  // 0: not asked
};

}  // namespace gptfast::cuda
