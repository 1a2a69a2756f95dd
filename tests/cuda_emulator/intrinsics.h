// CUDA's built-in functions: shuffles and votes, barriers, atomics, arithmetic.
#pragma once

#define EMU_SITE int emu_line = __builtin_LINE()

inline void __syncthreads(EMU_SITE) { emu::bar_sync(0, emu::B->live, emu_line); }
inline void __syncwarp(uint32_t m = 0xffffffffu, EMU_SITE) {
  emu::collective(m, "__syncwarp", emu_line, nullptr,
                  [](uint32_t, void**) { EMU_RACE(emu::race::sync_warp(emu::B->cur->warp);) });
}

// ---- shuffles: lane l receives what lane source(l, its own argument) sent -------------------------------------------

template <class T, class F> inline T emu_shfl(uint32_t mask, T v, int arg, F source, const char* what, int line) {
  struct A {
    T in, out;
    int arg;
  } a{v, v, arg};
  emu::collective(mask, what, line, &a, [&](uint32_t m, void** p) {
    for (int l = 0; l < 32; l++) {
      if (!(m >> l & 1)) continue;
      const int s = source(l, static_cast<A*>(p[l])->arg);
      if (!(m >> s & 1)) emu::fail("%s reads lane %d, which is not in the mask or has exited", what, s);
      static_cast<A*>(p[l])->out = static_cast<A*>(p[s])->in;
    }
  });
  return a.out;
}
template <class T> inline T __shfl_sync(uint32_t m, T v, int src, int w = 32, EMU_SITE) {
  return emu_shfl(m, v, src, [=](int l, int s) { return (l & ~(w - 1)) | (s & (w - 1)); }, "__shfl_sync", emu_line);
}
template <class T> inline T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32, EMU_SITE) {
  const auto source = [=](int l, int mask) {
    const int s = l ^ mask;
    return (s & ~(w - 1)) <= (l & ~(w - 1)) ? s : l;
  };
  return emu_shfl(m, v, x, source, "__shfl_xor_sync", emu_line);
}
template <class T> inline T __shfl_down_sync(uint32_t m, T v, unsigned d, int w = 32, EMU_SITE) {
  const auto source = [=](int l, int distance) {
    const int s = l + distance;
    return (s & ~(w - 1)) == (l & ~(w - 1)) ? s : l;
  };
  return emu_shfl(m, v, int(d), source, "__shfl_down_sync", emu_line);
}
template <class T> inline T __shfl_up_sync(uint32_t m, T v, unsigned d, int w = 32, EMU_SITE) {
  const auto source = [=](int l, int distance) {
    const int s = l - distance;
    return s >= (l & ~(w - 1)) ? s : l;
  };
  return emu_shfl(m, v, int(d), source, "__shfl_up_sync", emu_line);
}

// ---- votes and warp reductions --------------------------------------------------------------------------------------

template <class T, class Op> inline T emu_reduce(uint32_t mask, T v, Op op, const char* what, int line) {
  emu::collective(mask, what, line, &v, [&](uint32_t m, void** p) {
    bool first = true;
    T r{};
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) r = first ? *static_cast<T*>(p[l]) : op(r, *static_cast<T*>(p[l])), first = false;
    for (int l = 0; l < 32; l++)
      if (m >> l & 1) *static_cast<T*>(p[l]) = r;
  });
  return v;
}
inline uint32_t __ballot_sync(uint32_t m, int pred, EMU_SITE) {
  const uint32_t mine = uint32_t(pred != 0) << emu::B->cur->lane;
  return emu_reduce(m, mine, [](uint32_t a, uint32_t b) { return a | b; }, "__ballot_sync", emu_line);
}
inline int __any_sync(uint32_t m, int p, EMU_SITE) { return __ballot_sync(m, p, emu_line) != 0; }
inline int __all_sync(uint32_t m, int p, EMU_SITE) { return __ballot_sync(m, !p, emu_line) == 0; }
inline uint32_t __activemask() { return emu::B->alive[emu::B->cur->warp]; }
template <class T> inline T __reduce_add_sync(uint32_t m, T v, EMU_SITE) {
  return emu_reduce(m, v, [](T a, T b) { return T(a + b); }, "__reduce_add_sync", emu_line);
}
template <class T> inline T __reduce_max_sync(uint32_t m, T v, EMU_SITE) {
  return emu_reduce(m, v, [](T a, T b) { return a > b ? a : b; }, "__reduce_max_sync", emu_line);
}

// ---- atomics and fences -----------------------------------------------------------------------------------------------

template <class T, class F> inline T emu_rmw(T* p, F f) {
  [[maybe_unused]] const emu::Quiet quiet;
  T o, n;
  __atomic_load(p, &o, __ATOMIC_RELAXED);
  do n = f(o);
  while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return o;
}
template <class T> using emu_same = std::type_identity_t<T>;
template <class T> inline T atomicAdd(T* p, emu_same<T> v) {
  return emu_rmw(p, [=](T o) { return T(o + v); });
}
template <class T> inline T atomicMax(T* p, emu_same<T> v) {
  return emu_rmw(p, [=](T o) { return o > v ? o : v; });
}
template <class T> inline T atomicMin(T* p, emu_same<T> v) {
  return emu_rmw(p, [=](T o) { return o < v ? o : v; });
}
template <class T> inline T atomicExch(T* p, emu_same<T> v) {
  return emu_rmw(p, [=](T) { return v; });
}
template <class T> inline T atomicCAS(T* p, emu_same<T> c, emu_same<T> v) {
  return emu_rmw(p, [=](T o) { return o == c ? v : o; });
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emu::spin_yield(); }
[[noreturn]] inline void __trap() { emu::fail("__trap()"); }

// ---- arithmetic ---------------------------------------------------------------------------------------------------------

using std::max;
using std::min;
template <class To, class From> inline To emu_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To r;
  memcpy(&r, &x, sizeof r);
  return r;
}
inline float __int_as_float(int x) { return emu_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu_bits<int>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float2int_rn(float x) { return int(nearbyintf(x)); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T v) { *p = v; }
