// Every wrapper of mma.cuh, hopper.cuh and wgmma.cuh in a small kernel: bits in, bits out. Built by nvcc this library runs the
// instructions, built by g++ what the emulator takes them for; tests/cuda/test_conformance.py holds both to plain definitions.
#include <map>
#include <stdexcept>
#include <string>

#include "../../csrc/cuda/causal_attention_tile.cuh"
#include "../../csrc/cuda/wgmma.cuh"

using namespace gptfast::cuda;
using gptfast::DType;

namespace {

// ---- sm_80 ----------------------------------------------------------------------------------------------------------

__global__ void exp2_kernel(const float* in, float* out) { out[threadIdx.x] = fast_exp2(in[threadIdx.x]); }
__global__ void tf32_kernel(const float* in, uint32_t* out) { out[threadIdx.x] = to_tf32(in[threadIdx.x]); }

// One piece of BYTES a thread; every third one is not valid and becomes zeros.
template <int BYTES> __global__ void copy_kernel(const char* in, char* out) {
  DYN_SMEM(smem);
  const int t = threadIdx.x;
  cp_async<BYTES>(smem_u32(smem) + t * BYTES, in + t * BYTES, t % 3 != 0);
  cp_async_commit();
  cp_async_wait<0>();
  memcpy(out + t * BYTES, smem + t * BYTES, BYTES);
}

// Four 8 x 8 matrices of 16 bits, row after row; out: the four words of each lane.
template <bool TRANSPOSED> __global__ void ldmatrix_kernel(const uint4* in, uint4* out) {
  DYN_SMEM(smem);
  uint4* rows = reinterpret_cast<uint4*>(smem);
  rows[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  uint32_t r[4];
  if constexpr (TRANSPOSED) ldmatrix_x4_trans(r, smem_u32(rows + threadIdx.x));
  else ldmatrix_x4(r, smem_u32(rows + threadIdx.x));
  out[threadIdx.x] = make_uint4(r[0], r[1], r[2], r[3]);
}

// in: a (16, 16), b (16, 8), c (16, 8); out: a b + c
template <class E> __global__ void mma_kernel(const float* in, float* out) {
  const float *a = in, *b = a + 16 * 16, *c = b + 16 * 8;
  const int g = threadIdx.x / 4, t2 = threadIdx.x % 4 * 2;
  auto from_b = [&](int k) { return pair<E>(b[k * 8 + g], b[(k + 1) * 8 + g]); };
  uint32_t fragment[4];
  float d[4];
  for (int i = 0; i < 4; i++) {
    const float* x = a + (g + i % 2 * 8) * 16 + t2 + i / 2 * 8;
    fragment[i] = pair<E>(x[0], x[1]);
  }
  for (int e = 0; e < 4; e++) d[e] = c[(g + e / 2 * 8) * 8 + t2 + e % 2];
  mma_16<E>(d, fragment, from_b(t2), from_b(t2 + 8));
  for (int e = 0; e < 4; e++) out[(g + e / 2 * 8) * 8 + t2 + e % 2] = d[e];
}
// in: a (16, 8), b (8, 8), c (16, 8); out: a b + c
__global__ void mma_tf32_kernel(const float* in, float* out) {
  const float *a = in, *b = a + 16 * 8, *c = b + 8 * 8;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  auto from_a = [&](int row, int k) { return to_tf32(a[row * 8 + k]); };
  float d[4];
  for (int e = 0; e < 4; e++) d[e] = c[(g + e / 2 * 8) * 8 + 2 * t + e % 2];
  mma_tf32(d, from_a(g, t), from_a(g + 8, t), from_a(g, t + 4), from_a(g + 8, t + 4), to_tf32(b[t * 8 + g]),
           to_tf32(b[(t + 4) * 8 + g]));
  for (int e = 0; e < 4; e++) out[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = d[e];
}

// ---- sm_90a ---------------------------------------------------------------------------------------------------------

// in: a (64, 64), b (64, 8 R), c (64, 8 R); out: a b + c (without c unless `add`), in four steps of 16.
template <class E, int R, bool REGISTERS, int TA, int TB>
__global__ void __launch_bounds__(128) wgmma_kernel(const float* in, float* out, int add) {
#if defined(GPTFAST_HOPPER)
  constexpr int N = 8 * R, PANEL = 64 * 128;  // 64 rows of 64 values
  DYN_SMEM(smem);
  const float *a = in, *b = a + 64 * 64, *c = b + 64 * N;
  const Tile<E, 64> a_tile{smem};
  for (int i = threadIdx.x; i < 64 * 64; i += 128)
    from_float(TA ? *a_tile.at(i % 64, i / 64) : *a_tile.at(i / 64, i % 64), a[i]);
  for (int i = threadIdx.x; i < 64 * N; i += 128) {
    const int k = i / N, n = i % N;
    const Tile<E, 64> b_tile{smem + PANEL + (TB ? n / 64 * PANEL : 0)};
    from_float(TB ? *b_tile.at(k, n % 64) : *b_tile.at(n, k), b[i]);
  }
  fence_proxy_async();
  __syncthreads();

  const int row = int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4, t2 = threadIdx.x % 4 * 2;
  uint32_t fragments[4][4];
  float d[R][4];
  for (int k = 0; k < 4; k++)
    for (int i = 0; i < 4; i++) {
      const float* x = a + (row + i % 2 * 8) * 64 + k * 16 + t2 + i / 2 * 8;
      fragments[k][i] = pair<E>(x[0], x[1]);
    }
  auto each = [&](auto f) {
#pragma unroll
    for (int j = 0; j < R; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) f(d[j][e], (row + e / 2 * 8) * N + j * 8 + t2 + e % 2);
  };
  each([&](float& x, int at) { x = c[at]; });
  const uint32_t a_at = smem_u32(smem), b_at = a_at + PANEL;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++) {
    auto operand = [&](uint32_t at, bool across) {
      return across ? smem_descriptor(at + k * 16 * 128, PANEL, 1024) : smem_descriptor(at + k * 32, 16, 1024);
    };
    if constexpr (REGISTERS) wgmma<E, TB>(d, fragments[k], operand(b_at, TB), add || k);
    else wgmma<E, TA, TB>(d, operand(a_at, TA), operand(b_at, TB), add || k);
  }
  wgmma_commit();
  wgmma_wait<0>();
  each([&](float x, int at) { out[at] = x; });
#endif
}

struct Corner {
  int x, y, z, w;
};
// The tile of 64 x `rows` values at a corner; out: shared memory as it then is.
__global__ void tma_kernel(uint32_t* out, const __grid_constant__ CUtensorMap map, Corner at, int rows) {
#if defined(GPTFAST_HOPPER)
  DYN_SMEM(smem);
  const uint32_t full = smem_u32(smem) + rows * 128;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_expect(full, rows * 128);
    tma_load(smem_u32(smem), &map, full, at.x, at.y, at.z, at.w);
  }
  mbarrier_wait(full, 0);
  for (int i = threadIdx.x; i < rows * 32; i += blockDim.x) out[i] = reinterpret_cast<const uint32_t*>(smem)[i];
#endif
}

// The other way: shared memory, which becomes what `in` holds, is stored as (or added to) the tile at a corner.
__global__ void tma_store_kernel(const uint32_t* in, const __grid_constant__ CUtensorMap map, Corner at, int rows,
                                 int add) {
#if defined(GPTFAST_HOPPER)
  DYN_SMEM(smem);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  for (int i = threadIdx.x; i < rows * 32; i += blockDim.x) words[i] = in[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x) return;
  if (add) tma_add(&map, smem_u32(smem), at.x, at.y, at.z, at.w);
  else tma_store(&map, smem_u32(smem), at.x, at.y, at.z, at.w);
  tma_commit();
  tma_wait_read<0>();
  for (int i = 0; i < rows * 32; i++) words[i] = 0;  // of no consequence any more
  tma_wait<0>();
#endif
}

// Warp 1 hands `steps` rows of 32 words to warp 0 through one row of shared memory and two barriers.
__global__ void mbarrier_kernel(const uint32_t* in, uint32_t* out, int steps) {
#if defined(GPTFAST_HOPPER)
  DYN_SMEM(smem);
  uint32_t* row = reinterpret_cast<uint32_t*>(smem);
  const uint32_t full = smem_u32(smem) + 128, empty = full + 8;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    mbarrier_init(full, 32), mbarrier_init(empty, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int i = 0; i < steps; i++) {
    if (threadIdx.x / 32 == 1) {
      mbarrier_wait(empty, i % 2 ^ 1);
      row[lane] = in[i * 32 + lane];
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, i % 2);
      out[i * 32 + lane] = row[lane ^ 1];
      __syncwarp();
      if (lane == 0) mbarrier_arrive(empty);
    }
  }
#endif
}

// Warpgroups 1 and 2 exchange their words while warpgroup 0, whose registers they take, is gone.
__global__ void __launch_bounds__(384, 1) warpgroups_kernel(const uint32_t* in, uint32_t* out) {
#if defined(GPTFAST_HOPPER)
  DYN_SMEM(smem);
  uint32_t* words = reinterpret_cast<uint32_t*>(smem);
  if (threadIdx.x < 128) {
    setmaxnreg_dec<24>();
    return;
  }
  setmaxnreg_inc<240>();
  const int t = int(threadIdx.x) - 128;
  words[t] = in[t];
  named_barrier(1, 256);
  out[t] = words[255 - t];
#endif
}

// ---- the library ----------------------------------------------------------------------------------------------------

// A copy of host memory that kernels can read and write; `to_host` brings it back.
struct Buffer {
  void *host, *data = nullptr;
  size_t bytes;
#if defined(CUDA_EMU)
  Buffer(const void* from, size_t n) : host(const_cast<void*>(from)), bytes(n) {
    if (posix_memalign(&data, 256, n)) throw std::bad_alloc();
    memcpy(data, from, n);
  }
  ~Buffer() { free(data); }
  std::string to_host() {
    memcpy(host, data, bytes);
    return "";
  }
#else
  Buffer(const void* from, size_t n) : host(const_cast<void*>(from)), bytes(n) {
    cudaMalloc(&data, n);
    cudaMemcpy(data, from, n, cudaMemcpyHostToDevice);
  }
  ~Buffer() { cudaFree(data); }
  std::string to_host() {  // its status is also that of what ran before
    const cudaError_t error = cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  }
#endif
  template <class T> T* as() { return static_cast<T*>(data); }
};

using Run = void (*)(Buffer& in, Buffer& out, const int* options);

// A kernel of (in, out) over one block.
template <auto kernel, int THREADS, int SMEM, class In, class Out> void simple(Buffer& in, Buffer& out, const int*) {
  LAUNCH(kernel, dim3(1), dim3(THREADS), SMEM, nullptr, in.as<In>(), out.as<Out>());
}
template <class E, int R, bool REGISTERS, int TA, int TB> void run_wgmma(Buffer& in, Buffer& out, const int* options) {
  auto kernel = wgmma_kernel<E, R, REGISTERS, TA, TB>;
  constexpr int smem = 64 * 128 * (1 + R / 8);
  LAUNCH(kernel, dim3(1), dim3(128), smem, nullptr, in.as<const float>(), out.as<float>(), options[0]);
}
// options: the tensor's dimensions, innermost first; the corner; rows of the tile; the dtype's number; whether to add
CUtensorMap map_of(const void* data, const int* o) {
  const DType dtype = DType(o[9]);
  const uint64_t row = uint64_t(o[0]) * (dtype == DType::f32 ? 4 : 2), matrix = row * uint64_t(o[1]);
  const TensorShape shape{data,
                          {uint64_t(o[0]), uint64_t(o[1]), uint64_t(o[2]), uint64_t(o[3])},
                          {row, matrix, matrix * uint64_t(o[2])},
                          dtype};
  CUtensorMap map;
  if (!tensor_map(&map, shape, uint32_t(o[8]))) throw std::runtime_error("the driver refuses the tensor map");
  return map;
}
void run_tma(Buffer& in, Buffer& out, const int* o) {
  const CUtensorMap map = map_of(in.data, o);
  const Corner corner{o[4], o[5], o[6], o[7]};
  LAUNCH(tma_kernel, dim3(1), dim3(64), size_t(o[8]) * 128 + 8, nullptr, out.as<uint32_t>(), map, corner, o[8]);
}
void run_tma_store(Buffer& in, Buffer& out, const int* o) {
  const CUtensorMap map = map_of(out.data, o);
  const Corner corner{o[4], o[5], o[6], o[7]};
  LAUNCH(tma_store_kernel, dim3(1), dim3(64), size_t(o[8]) * 128, nullptr, in.as<const uint32_t>(), map, corner, o[8],
         o[10]);
}
void run_mbarrier(Buffer& in, Buffer& out, const int* o) {
  LAUNCH(mbarrier_kernel, dim3(1), dim3(64), 128 + 16, nullptr, in.as<const uint32_t>(), out.as<uint32_t>(), o[0]);
}

template <class E, int R> void add_wgmma(std::map<std::string, Run>& all, const std::string& name) {
  all[name + " shared 00"] = run_wgmma<E, R, false, 0, 0>, all[name + " shared 01"] = run_wgmma<E, R, false, 0, 1>;
  all[name + " shared 10"] = run_wgmma<E, R, false, 1, 0>, all[name + " shared 11"] = run_wgmma<E, R, false, 1, 1>;
  all[name + " registers 0"] = run_wgmma<E, R, true, 0, 0>, all[name + " registers 1"] = run_wgmma<E, R, true, 0, 1>;
}
std::map<std::string, Run> wrappers() {
  std::map<std::string, Run> all;
  all["exp2"] = simple<exp2_kernel, 1024, 0, const float, float>;
  all["tf32"] = simple<tf32_kernel, 1024, 0, const float, uint32_t>;
  all["cp_async 4"] = simple<copy_kernel<4>, 64, 256, const char, char>;
  all["cp_async 16"] = simple<copy_kernel<16>, 64, 1024, const char, char>;
  all["ldmatrix"] = simple<ldmatrix_kernel<false>, 32, 512, const uint4, uint4>;
  all["ldmatrix transposed"] = simple<ldmatrix_kernel<true>, 32, 512, const uint4, uint4>;
  all["mma bf16"] = simple<mma_kernel<bf16>, 32, 0, const float, float>;
  all["mma fp16"] = simple<mma_kernel<__half>, 32, 0, const float, float>;
  all["mma tf32"] = simple<mma_tf32_kernel, 32, 0, const float, float>;
  all["warpgroups"] = simple<warpgroups_kernel, 384, 1024, const uint32_t, uint32_t>;
  all["tma"] = run_tma, all["tma store"] = run_tma_store, all["mbarrier"] = run_mbarrier;
  add_wgmma<bf16, 8>(all, "wgmma bf16 64"), add_wgmma<bf16, 16>(all, "wgmma bf16 128");
  add_wgmma<__half, 8>(all, "wgmma fp16 64"), add_wgmma<__half, 16>(all, "wgmma fp16 128");
  return all;
}

}  // namespace

// Runs one wrapper; "" or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* conformance(const char* name, const void* in,
                                                                          size_t in_bytes, void* out, size_t out_bytes,
                                                                          const int* options) {
  static const std::map<std::string, Run> all = wrappers();
  static std::string message;
  try {
    Buffer input(in, in_bytes), output(out, out_bytes);
    all.at(name)(input, output, options);
    message = output.to_host();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
