// Every instruction of sm_80 that C++ has no name for: asynchronous copies, ldmatrix, mma.sync. Each has a device body
// (inline PTX) and an emulated body that follows the fragment layouts of the PTX ISA. Kernels call only these.
//
// Fragments are the same for all element types. With g = lane / 4 and t = lane % 4 a lane holds, as neighbouring pairs,
//     a (16 x 16): a[g][2t], a[g + 8][2t], a[g][2t + 8], a[g + 8][2t + 8]
//     b (16 x 8):  b[2t][g], b[2t + 8][g]  (pairs run down the column)
//     d (16 x 8):  d[g][2t], d[g + 8][2t]
// so that a result, packed, is the first operand of the next product. fp32 gets there by numbering the contraction
// 0 2 4 6 1 3 5 7 within every 8, for both operands.
#pragma once
#include "compat.cuh"

namespace gptfast::cuda {

// Two neighbouring elements.
template <class E> struct PairOf {
  using type = uint32_t;
};
template <> struct PairOf<float> {
  using type = float2;
};
template <class E> using Pair = typename PairOf<E>::type;

template <class E> DEV_INLINE Pair<E> pair(float x, float y);
template <> DEV_INLINE float2 pair<float>(float x, float y) { return make_float2(x, y); }
template <> DEV_INLINE uint32_t pair<__nv_bfloat16>(float x, float y) {
  const __nv_bfloat162 p = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&p);
}
template <> DEV_INLINE uint32_t pair<__half>(float x, float y) {
  const __half2 p = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&p);
}

#if !defined(CUDA_EMU)
// ---- device ---------------------------------------------------------------------------------------------------------
DEV_INLINE uint32_t smem_u32(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
DEV_INLINE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Copies BYTES (4 or 16); writes zeros where `valid` is false.
template <int BYTES = 16> DEV_INLINE void cp_async(uint32_t to, const void* from, bool valid = true) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
}
DEV_INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV_INLINE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
DEV_INLINE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
DEV_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
#define GPTFAST_MMA_16(TYPE, NAME)                                                                            \
  template <> DEV_INLINE void mma_16<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                       \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
template <class E> DEV_INLINE void mma_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
GPTFAST_MMA_16(__nv_bfloat16, "bf16")
GPTFAST_MMA_16(__half, "f16")
#undef GPTFAST_MMA_16
DEV_INLINE uint32_t to_tf32(float x) {  // rounded to 11 significant bits
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// d (16 x 8) += a (16 x 8) b (8 x 8)
DEV_INLINE void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
// ---- emulated -------------------------------------------------------------------------------------------------------
using emu::smem_u32;
inline float fast_exp2(float x) { return exp2f(x); }
template <int BYTES = 16> inline void cp_async(uint32_t to, const void* from, bool valid = true, EMU_SITE) {
  emu::B->cur->where = "cp.async", emu::B->cur->line = emu_line;
  char* d = emu::smem_ptr(to, BYTES, BYTES, "cp.async");
  if (valid && uintptr_t(from) % BYTES) emu::fail("cp.async: global address is not %d-byte aligned", BYTES);
  auto copy = [=] {
    [[maybe_unused]] const emu::Quiet quiet;
    EMU_RACE(emu::race::access(-1, d - emu::B->smem, BYTES, true);)
    if (valid) memcpy(d, from, BYTES);
    else memset(d, 0, BYTES);
  };
  if (emu::opt().lazy) emu::B->cur->cp_open.push_back({copy});
  else copy();
}
inline void cp_async_commit() {
  auto& f = *emu::B->cur;
  f.cp_group.push_back(std::move(f.cp_open));
  f.cp_open.clear();
}
template <int N> inline void cp_async_wait() {
  auto& groups = emu::B->cur->cp_group;
  while (int(groups.size()) > N) {
    for (auto& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}
inline void emu_ldmatrix(uint32_t (&r)[4], uint32_t addr, bool trans, int line) {
  struct Arg {
    uint32_t* r;
    const char* row;
  } arg{r, emu::smem_ptr(addr, 16, 16, "ldmatrix")};
  emu::collective(0xffffffffu, trans ? "ldmatrix.trans" : "ldmatrix", line, &arg, [&](uint32_t m, void** p) {
    if (m != 0xffffffffu) emu::fail("ldmatrix needs the whole warp");
    [[maybe_unused]] const emu::Quiet quiet;
    EMU_RACE(for (int l = 0; l < 32; l++) emu::race::access(l, ((Arg*)p[l])->row - emu::B->smem, 16, false);)
    for (int q = 0; q < 4; q++)
      for (int t = 0; t < 32; t++) {
        uint16_t e[2];
        for (int k = 0; k < 2; k++) {
          const int row = trans ? t % 4 * 2 + k : t / 4, col = trans ? t / 4 : t % 4 * 2 + k;
          memcpy(&e[k], ((Arg*)p[q * 8 + row])->row + col * 2, 2);
        }
        memcpy(&((Arg*)p[t])->r[q], e, 4);
      }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, EMU_SITE) { emu_ldmatrix(r, a, false, emu_line); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, EMU_SITE) { emu_ldmatrix(r, a, true, emu_line); }

template <class E> inline float emu_half_of(uint32_t w, int high);  // one value of a packed pair
template <> inline float emu_half_of<__nv_bfloat16>(uint32_t w, int high) {
  return __uint_as_float(high ? w & 0xffff0000u : w << 16);
}
template <> inline float emu_half_of<__half>(uint32_t w, int high) {
  return __half2float(__ushort_as_half(uint16_t(high ? w >> 16 : w)));
}
template <class E> inline void mma_16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMU_SITE) {
  struct Arg {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } arg{d, a, {b0, b1}};
  emu::collective(0xffffffffu, "mma.m16n8k16", emu_line, &arg, [](uint32_t m, void** p) {
    if (m != 0xffffffffu) emu::fail("mma needs the whole warp");
    float A[16][16], Bm[16][8];
    for (int l = 0; l < 32; l++) {
      const Arg& x = *(Arg*)p[l];
      const int g = l >> 2, t = (l & 3) * 2;
      for (int h = 0; h < 2; h++) {
        A[g][t + h] = emu_half_of<E>(x.a[0], h), A[g + 8][t + h] = emu_half_of<E>(x.a[1], h);
        A[g][t + 8 + h] = emu_half_of<E>(x.a[2], h), A[g + 8][t + 8 + h] = emu_half_of<E>(x.a[3], h);
        Bm[t + h][g] = emu_half_of<E>(x.b[0], h), Bm[t + 8 + h][g] = emu_half_of<E>(x.b[1], h);
      }
    }
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++) {
        float& c = ((Arg*)p[l])->d[e];
        for (int k = 0; k < 16; k++) c += A[(l >> 2) + e / 2 * 8][k] * Bm[k][(l & 3) * 2 + e % 2];
      }
  });
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}
inline void mma_tf32(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     EMU_SITE) {
  struct Arg {
    float* d;
    uint32_t a[4], b[2];
  } arg{d, {a0, a1, a2, a3}, {b0, b1}};
  emu::collective(0xffffffffu, "mma.m16n8k8.tf32", emu_line, &arg, [](uint32_t m, void** p) {
    if (m != 0xffffffffu) emu::fail("mma needs the whole warp");
    float A[16][8], Bm[8][8];
    auto tf32 = [](uint32_t w) { return __uint_as_float(w & 0xffffe000u); };
    for (int l = 0; l < 32; l++) {
      const Arg& x = *(Arg*)p[l];
      const int g = l >> 2, t = l & 3;
      A[g][t] = tf32(x.a[0]), A[g + 8][t] = tf32(x.a[1]), A[g][t + 4] = tf32(x.a[2]), A[g + 8][t + 4] = tf32(x.a[3]);
      Bm[t][g] = tf32(x.b[0]), Bm[t + 4][g] = tf32(x.b[1]);
    }
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < 4; e++) {
        float& c = ((Arg*)p[l])->d[e];
        for (int k = 0; k < 8; k++) c += A[(l >> 2) + e / 2 * 8][k] * Bm[k][(l & 3) * 2 + e % 2];
      }
  });
}
#endif

// d (16 x 8) += a (16 x 16) b (16 x 8)
template <class E, bool TRANSPOSED = false>
DEV_INLINE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  mma_16<E>(d, a, b[0], b[1]);
}
// fp32 as three products of tf32 halves (Ootomo and Yokota, arXiv 2203.03341): x = hi + lo to 22 bits, and lo * lo is
// below what fp32 keeps. An infinite operand gives nan. TRANSPOSED: to the bit what b a^T gives without.
template <class E, bool TRANSPOSED = false> DEV_INLINE void mma(float (&d)[4], const float2 (&a)[4], const float2* b) {
  auto low = [](float x, uint32_t high) { return to_tf32(x - __uint_as_float(high)); };
#pragma unroll
  for (int s = 0; s < 2; s++) {  // contraction steps of 8: first members of the pairs, then the second ones
    const float x[4] = {a[2 * s].x, a[2 * s + 1].x, a[2 * s].y, a[2 * s + 1].y}, y[2] = {b[s].x, b[s].y};
    uint32_t ah[4], al[4], bh[2], bl[2];
#pragma unroll
    for (int i = 0; i < 4; i++) ah[i] = to_tf32(x[i]), al[i] = low(x[i], ah[i]);
#pragma unroll
    for (int i = 0; i < 2; i++) bh[i] = to_tf32(y[i]), bl[i] = low(y[i], bh[i]);
    if (!TRANSPOSED) mma_tf32(d, al[0], al[1], al[2], al[3], bh[0], bh[1]);
    mma_tf32(d, ah[0], ah[1], ah[2], ah[3], bl[0], bl[1]);
    if (TRANSPOSED) mma_tf32(d, al[0], al[1], al[2], al[3], bh[0], bh[1]);
    mma_tf32(d, ah[0], ah[1], ah[2], ah[3], bh[0], bh[1]);
  }
}

}  // namespace gptfast::cuda
