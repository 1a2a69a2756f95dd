// wgmma, the tensor cores of sm_90a: each instruction with a device body and an emulated body, as in hopper.cuh.
//
// Operands lie in shared memory as panels: rows of 64 values (128 bytes) in the 128-byte swizzle, which TMA writes and
// Tile<E, 64> (causal_attention_tile.cuh) reads. A descriptor names the first row and column.
#pragma once
#include "hopper.cuh"

namespace gptfast::cuda {

// Shared-memory matrix descriptor with 128-byte swizzle (PTX ISA, "Matrix descriptor"); offsets in bytes. Rows along the
// contraction (K-major): the stride offset leads to the next 8 rows. Rows across it (MN-major): the leading offset leads
// to the next 64 columns, the stride offset to the next 8 rows.
DEV_INLINE uint64_t smem_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t((leading & 0x3ffff) >> 4) << 16 |
         uint64_t((stride & 0x3ffff) >> 4) << 32 | 1ull << 62;
}
// The same `bytes` further on. One addition: the 14 bits of the address do not overflow, as shared memory ends below 2^18.
DEV_INLINE uint64_t moved(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes / 16); }

#if !defined(CUDA_EMU)
// ---- device ---------------------------------------------------------------------------------------------------------
DEV_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEV_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEV_INLINE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// d (64 x 8 R) = a (64 x 16) b (16 x 8 R), plus d where `add`. TA, TB: the operand in shared memory is MN-major.
template <class E, int TA, int TB, int R>
DEV_INLINE void wgmma(float (&d)[R][4], uint64_t a, uint64_t b, int add);  // a in shared memory
template <class E, int TB, int R>
DEV_INLINE void wgmma(float (&d)[R][4], const uint32_t (&a)[4], uint64_t b, int add);  // a in registers, as for mma

// clang-format off
#define GPTFAST_D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define GPTFAST_D4(i) GPTFAST_D1(i), GPTFAST_D1(i + 1), GPTFAST_D1(i + 2), GPTFAST_D1(i + 3)
#define GPTFAST_D8 GPTFAST_D4(0), GPTFAST_D4(4)
#define GPTFAST_D16 GPTFAST_D8, GPTFAST_D4(8), GPTFAST_D4(12)
#define GPTFAST_R8 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27,%28,%29,%30,%31"
#define GPTFAST_R16 GPTFAST_R8 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// O0, O1, …: the operands after the R * 4 results
#define GPTFAST_WGMMA(E, NAME, R, N, O0, O1, O2, O3, O4, O5, O6)                                                           \
  template <int TA, int TB> DEV_INLINE void wgmma_shared(E, float (&d)[R][4], uint64_t a, uint64_t b, int add) {           \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #O2 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "."    \
                 NAME " {" GPTFAST_R##R "}, %" #O0 ", %" #O1 ", p, 1, 1, %" #O3 ", %" #O4 "; }"                            \
                 : GPTFAST_D##R : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));                                             \
  }                                                                                                                        \
  template <int TB> DEV_INLINE void wgmma_registers(E, float (&d)[R][4], const uint32_t (&a)[4], uint64_t b, int add) {    \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #O5 ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "."    \
                 NAME " {" GPTFAST_R##R "}, {%" #O0 ", %" #O1 ", %" #O2 ", %" #O3 "}, %" #O4 ", p, 1, 1, %" #O6 "; }"      \
                 : GPTFAST_D##R : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB));                  \
  }
GPTFAST_WGMMA(__nv_bfloat16, "bf16", 8, 64, 32, 33, 34, 35, 36, 37, 38)
GPTFAST_WGMMA(__half, "f16", 8, 64, 32, 33, 34, 35, 36, 37, 38)
GPTFAST_WGMMA(__nv_bfloat16, "bf16", 16, 128, 64, 65, 66, 67, 68, 69, 70)
GPTFAST_WGMMA(__half, "f16", 16, 128, 64, 65, 66, 67, 68, 69, 70)
#undef GPTFAST_WGMMA
// clang-format on
template <class E, int TA, int TB, int R> DEV_INLINE void wgmma(float (&d)[R][4], uint64_t a, uint64_t b, int add) {
  wgmma_shared<TA, TB>(E(), d, a, b, add);
}
template <class E, int TB, int R> DEV_INLINE void wgmma(float (&d)[R][4], const uint32_t (&a)[4], uint64_t b, int add) {
  wgmma_registers<TB>(E(), d, a, b, add);
}
#else
// ---- emulated -------------------------------------------------------------------------------------------------------
inline void wgmma_fence(EMU_SITE) {
  emu::wg_collective("wgmma.fence", emu_line, nullptr, [](int g, void**) { emu::B->wg_fenced[g] = true; });
}
inline void wgmma_commit(EMU_SITE) {
  emu::wg_collective("wgmma.commit_group", emu_line, nullptr, [](int g, void**) {
    emu::B->wg_group[g].push_back(std::move(emu::B->wg_open[g]));
    emu::B->wg_open[g].clear();
    EMU_RACE(emu::race::wg_commit(g);)
  });
}
template <int N> inline void wgmma_wait(EMU_SITE) {
  emu::wg_collective("wgmma.wait_group", emu_line, nullptr, [](int g, void**) {
    emu::B->wg_fenced[g] = false;
    auto& groups = emu::B->wg_group[g];
    while (int(groups.size()) > N) {
      for (auto& product : groups.front()) product.run();
      groups.erase(groups.begin());
    }
    EMU_RACE(emu::race::wg_wait(g, N);)
  });
}
// One element of an operand through its descriptor; r is the index across the contraction.
template <class E> inline float emu_operand([[maybe_unused]] int product, uint64_t d, bool mn_major, int r, int k) {
  const uint32_t start = uint32_t(d & 0x3fff) << 4, leading = uint32_t(d >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(d >> 32 & 0x3fff) << 4;
  if (d >> 62 != 1) emu::fail("wgmma: only the 128-byte swizzle is emulated");
  const uint32_t a = emu_swizzle(mn_major ? start + r / 64 * leading + r % 64 * 2 + k / 8 * stride + k % 8 * 128
                                          : start + r / 8 * stride + r % 8 * 128 + k * 2);
  EMU_RACE(emu::race::wg_read(product, a - emu::kSmemBase, 2);)
  uint16_t v;
  memcpy(&v, emu::smem_ptr(a, 2, 2, "wgmma operand"), 2);
  return emu_half_of<E>(v, 0);
}
template <class E, int R, bool REGISTERS, int TA, int TB>
inline void emu_wgmma(float (&d)[R][4], const uint32_t* a, uint64_t a_desc, uint64_t b_desc, int add, int line) {
  constexpr int N = R * 8;
  struct Arg {
    float (*d)[4];
    const uint32_t* a;
    uint64_t a_desc, b_desc;
    int add;
  } arg{d, a, a_desc, b_desc, add};
  emu::wg_collective("wgmma", line, &arg, [](int g, void** p) {
    if (!emu::B->wg_fenced[g]) emu::fail("wgmma: no wgmma.fence since its registers may have been written");
    struct Op {
      float (*d[128])[4];
      uint32_t a[128][4];
      uint64_t a_desc, b_desc;
      int add;
    };
    auto op = std::make_shared<Op>();
    const Arg& first = *static_cast<Arg*>(p[0]);
    op->a_desc = first.a_desc, op->b_desc = first.b_desc, op->add = first.add;
    for (int t = 0; t < 128; t++) {
      const Arg& x = *static_cast<Arg*>(p[t]);
      if (x.b_desc != op->b_desc || x.add != op->add || (!REGISTERS && x.a_desc != op->a_desc))
        emu::fail("wgmma: descriptors differ between lanes 0 and %d", t);
      op->d[t] = x.d;
      if (REGISTERS) memcpy(op->a[t], x.a, 16);
    }
    int number = 0;
    EMU_RACE(number = emu::race::wg_issue(g);)
    auto product = [op, number] {
      [[maybe_unused]] const emu::Quiet quiet;
      static thread_local float A[64][16], Bm[16][N];
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < N; n++) Bm[k][n] = emu_operand<E>(number, op->b_desc, TB, n, k);
      for (int r = 0; r < 64; r++)
        for (int k = 0; k < 16; k++) {
          const int t = r / 16 * 32 + r % 8 * 4 + k % 8 / 2, word = k / 8 * 2 + r % 16 / 8;
          A[r][k] = REGISTERS ? emu_half_of<E>(op->a[t][word], k % 2) : emu_operand<E>(number, op->a_desc, TA, r, k);
        }
      for (int t = 0; t < 128; t++)
        for (int j = 0; j < R; j++)
          for (int e = 0; e < 4; e++) {
            const int r = t / 32 * 16 + t % 32 / 4 + e / 2 * 8, c = j * 8 + t % 4 * 2 + e % 2;
            float sum = op->add ? op->d[t][j][e] : 0.f;
            for (int k = 0; k < 16; k++) sum += A[r][k] * Bm[k][c];
            op->d[t][j][e] = sum;
          }
    };
    if (emu::opt().lazy_mma) emu::B->wg_open[g].push_back({product});
    else product();
  });
}
template <class E, int TA, int TB, int R>
inline void wgmma(float (&d)[R][4], uint64_t a, uint64_t b, int add, EMU_SITE) {
  emu_wgmma<E, R, false, TA, TB>(d, nullptr, a, b, add, emu_line);
}
template <class E, int TB, int R>
inline void wgmma(float (&d)[R][4], const uint32_t (&a)[4], uint64_t b, int add, EMU_SITE) {
  emu_wgmma<E, R, true, 0, TB>(d, a, 0, b, add, emu_line);
}
#endif

}  // namespace gptfast::cuda
