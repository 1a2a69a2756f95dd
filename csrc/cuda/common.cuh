// What the memory-bound kernels share: values of any dtype as fp32, 16-byte accesses, reductions, launch helpers.
#pragma once
#include <atomic>

#include "compat.cuh"
#include "kernels.h"

namespace gptfast::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;

// ---- dtypes ------------------------------------------------------------------------------------------------------

DEV_INLINE float to_float(float x) { return x; }
DEV_INLINE float to_float(bf16 x) { return __bfloat162float(x); }
DEV_INLINE float to_float(__half x) { return __half2float(x); }
DEV_INLINE void from_float(float& y, float x) { y = x; }
DEV_INLINE void from_float(bf16& y, float x) { y = __float2bfloat16(x); }
DEV_INLINE void from_float(__half& y, float x) { y = __float2half(x); }
// x as it reads back after being stored as T.
template <class T> DEV_INLINE float rounded(float x) {
  T y;
  from_float(y, x);
  return to_float(y);
}

// f(T{}) with the element type T of `dtype`.
template <class F> auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(__half{});
    default: return f(float{});
  }
}

// ---- V neighbouring values, in accesses of up to 16 bytes ---------------------------------------------------------

// The widest word that V values of T fill without a rest; the data must be aligned to it.
template <int bytes> struct WordOf {
  using type = unsigned char;
};
template <> struct WordOf<8> {
  using type = uint2;
};
template <> struct WordOf<0> {  // a multiple of 16
  using type = uint4;
};
template <class T, int V> using Word = typename WordOf<V * sizeof(T) == 8 ? 8 : V * sizeof(T) % 16>::type;

// V values as they lie in memory. Asked for before others are used, several loads are on their way at once; a load whose
// values are converted at once waits for memory, and so does all after it.
template <class T, int V> struct Raw {
  using W = Word<T, V>;
  static constexpr int kWords = V * int(sizeof(T)) / int(sizeof(W));
  W words[kWords];
  DEV_INLINE void load(const T* from) {
    EXPECT_ALIGNED(from, sizeof(W));
#pragma unroll
    for (int k = 0; k < kWords; k++) words[k] = reinterpret_cast<const W*>(from)[k];
  }
  DEV_INLINE void load(const void* data, DType, i64 at) { load(static_cast<const T*>(data) + at); }
  DEV_INLINE void store(T* to) const {
    EXPECT_ALIGNED(to, sizeof(W));
#pragma unroll
    for (int k = 0; k < kWords; k++) reinterpret_cast<W*>(to)[k] = words[k];
  }
  DEV_INLINE void zero() { memset(words, 0, sizeof words); }
  DEV_INLINE void values(float (&x)[V]) const {
    T parts[V];
    memcpy(parts, words, sizeof parts);
#pragma unroll
    for (int k = 0; k < V; k++) x[k] = to_float(parts[k]);
  }
};
template <class T> struct Raw<T, 1> {
  T value;
  DEV_INLINE void load(const T* from) { value = *from; }
  DEV_INLINE void load(const void* data, DType, i64 at) { load(static_cast<const T*>(data) + at); }
  DEV_INLINE void store(T* to) const { *to = value; }
  DEV_INLINE void zero() { from_float(value, 0.f); }
  DEV_INLINE void values(float (&x)[1]) const { x[0] = to_float(value); }
};

template <int V, class T> DEV_INLINE void load(float (&x)[V], const T* from) {
  Raw<T, V> raw;
  raw.load(from);
  raw.values(x);
}
template <int V, class T> DEV_INLINE void store(T* to, const float (&x)[V]) {
  T values[V];
#pragma unroll
  for (int k = 0; k < V; k++) from_float(values[k], x[k]);
  if constexpr (V == 1) {
    *to = values[0];
  } else {
    using W = Word<T, V>;
    EXPECT_ALIGNED(to, sizeof(W));
    W words[V * sizeof(T) / sizeof(W)];
    memcpy(words, values, sizeof words);
#pragma unroll
    for (int k = 0; k < int(V * sizeof(T) / sizeof(W)); k++) reinterpret_cast<W*>(to)[k] = words[k];
  }
}
// The same where the dtype is known at run time only; every thread of a launch takes one branch.
template <int V> DEV_INLINE void load_any(float (&x)[V], const void* from, DType dtype, i64 at) {
  if (dtype == DType::bf16) load<V>(x, static_cast<const bf16*>(from) + at);
  else if (dtype == DType::f16) load<V>(x, static_cast<const __half*>(from) + at);
  else load<V>(x, static_cast<const float*>(from) + at);
}
template <int V> DEV_INLINE void store_any(void* to, DType dtype, i64 at, const float (&x)[V]) {
  if (dtype == DType::bf16) store<V>(static_cast<bf16*>(to) + at, x);
  else if (dtype == DType::f16) store<V>(static_cast<__half*>(to) + at, x);
  else store<V>(static_cast<float*>(to) + at, x);
}

// Values whose dtype is known at run time only, for the combinations that are rare: as fp32.
struct Any {};
template <int V> struct Raw<Any, V> {
  float x[V];
  DEV_INLINE void load(const void* data, DType dtype, i64 at) { load_any<V>(x, data, dtype, at); }
  DEV_INLINE void zero() { memset(x, 0, sizeof x); }
  DEV_INLINE void values(float (&to)[V]) const { memcpy(to, x, sizeof x); }
};
template <> struct Raw<Any, 1> {
  float x[1];
  DEV_INLINE void load(const void* data, DType dtype, i64 at) { load_any<1>(x, data, dtype, at); }
  DEV_INLINE void zero() { x[0] = 0.f; }
  DEV_INLINE void values(float (&to)[1]) const { to[0] = x[0]; }
};

// May V values of every row be accessed at once? Absent tensors may.
inline bool aligned(const void* data, i64 stride, i64 size, int V) {
  const uintptr_t bytes = uintptr_t(V * size < 16 ? V * size : 16);
  return !data || (reinterpret_cast<uintptr_t>(data) % bytes == 0 && uintptr_t(stride * size) % bytes == 0);
}
inline bool aligned(const Rows& x, int V) { return aligned(x.data, x.stride, element_size(x.dtype), V); }
inline bool aligned(const MutRows& x, int V) { return aligned(x.data, x.stride, element_size(x.dtype), V); }
inline bool aligned(const Vector& x, int V) { return aligned(x.data, 0, element_size(x.dtype), V); }

// A number of values as a type. with_width: f(Width<16 / sizeof(T)>) where all may be accessed so, else f(Width<1>).
template <int V> struct Width {
  static constexpr int value = V;
};
template <class T, class F, class... Tensors> cudaError_t with_width(i64 C, F f, const Tensors&... tensors) {
  constexpr int V = 16 / int(sizeof(T));
  return C % V == 0 && (aligned(tensors, V) && ...) ? f(Width<V>{}) : f(Width<1>{});
}

// ---- reductions: the same bits in every thread, in an order that the number of threads fixes ---------------------

struct Sum {
  template <class T> DEV_INLINE T operator()(T a, T b) const { return a + b; }
  DEV_INLINE float2 operator()(float2 a, float2 b) const { return make_float2(a.x + b.x, a.y + b.y); }
};
struct Max {
  template <class T> DEV_INLINE T operator()(T a, T b) const { return a > b ? a : b; }
};

// Any type of whole 32-bit words, from the lane at distance `mask`.
template <class T> DEV_INLINE T shuffle_xor(T x, int mask) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof x);
#pragma unroll
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, mask);
  memcpy(&x, words, sizeof x);
  return x;
}
// Over a warp, or over each of its groups of LANES.
template <int LANES = 32, class T, class Op> DEV_INLINE T warp_reduce(T x, Op op) {
#pragma unroll
  for (int distance = LANES / 2; distance; distance >>= 1) {
    const T other = shuffle_xor(x, distance);
    x = threadIdx.x & distance ? op(other, x) : op(x, other);  // lower lane first: a fused a b + c d is not symmetric
  }
  return x;
}
// Over a one-dimensional block of whole warps. `scratch` is shared memory for one T a warp; `nothing` is neutral.
template <class T, class Op> DEV_INLINE T block_reduce(T x, Op op, T nothing, char* scratch) {
  T* parts = reinterpret_cast<T*>(scratch);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  x = warp_reduce(x, op);
  __syncthreads();  // the scratch may still be read from the last time
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  return warp_reduce(lane < int(blockDim.x >> 5) ? parts[lane] : nothing, op);
}

// The same with one barrier: `scratch` has room for two T a warp, and calls are made with turn 0, 1, 0, 1, …
template <class T, class Op> DEV_INLINE T block_reduce_in_turn(T x, Op op, T nothing, char* scratch, int turn) {
  T* parts = reinterpret_cast<T*>(scratch) + 32 * turn;  // those of the last turn may still be read
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  x = warp_reduce(x, op);
  if (lane == 0) parts[warp] = x;
  __syncthreads();
  return warp_reduce(lane < int(blockDim.x >> 5) ? parts[lane] : nothing, op);
}

// ---- launching ---------------------------------------------------------------------------------------------------

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline int round_to_warps(i64 threads, int most) {
  const i64 n = ceil_div(threads < 1 ? 1 : threads, 32) * 32;
  return n < most ? int(n) : most;
}
// The shared memory, in bytes, that a block of the current device may ask for.
inline cudaError_t shared_memory(int* most) {
  int device = 0;
  cudaError_t error = cleared(cudaGetDevice(&device));
  if (error == cudaSuccess)
    error = cleared(cudaDeviceGetAttribute(most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return error;
}
// Of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cleared(cudaGetDevice(&device));
  if (error == cudaSuccess) error = cleared(cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device));
  return error;
}
// What the code of a kernel for a device is like, from its attributes: asked once, as that takes longer than a launch.
class KernelFact {
 public:
  template <class F> bool holds(const void* kernel, F of_attributes) {
    int device = 0;
    if (cleared(cudaGetDevice(&device)) != cudaSuccess) return false;
    if (device < kDevices && answers_[device]) return answers_[device] > 0;
    cudaFuncAttributes attributes{};
    if (cleared(cudaFuncGetAttributes(&attributes, kernel)) != cudaSuccess) return false;
    const bool found = of_attributes(attributes);
    if (device < kDevices) answers_[device] = found ? 1 : -1;
    return found;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<signed char> answers_[kDevices] = {};  // 0: not asked
};
// Beyond 48 KB a kernel has to ask for its dynamic shared memory.
template <class... P> cudaError_t allow_smem(void (*kernel)(P...), size_t bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  return cleared(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

}  // namespace gptfast::cuda
