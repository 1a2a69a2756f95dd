// What sm_90a has besides wgmma (wgmma.cuh) and C++ has no name for: mbarrier, TMA loads, stores and additions of tiles,
// register reallocation. As in mma.cuh each instruction has a device body and an emulated body.
//
// A tile in shared memory is a panel: rows of 128 bytes in the 128-byte swizzle, at an address that is a multiple of 1024.
#pragma once
#include <cuda.h>

#include "mma.cuh"

#if defined(CUDA_EMU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GPTFAST_HOPPER 1  // this pass compiles for sm_90a
#endif
// The launch bounds of a kernel whose body needs GPTFAST_HOPPER. Other device passes make a kernel that traps, and that no
// launch of the threads it needs can start: the host reads the bound before it chooses the kernel (has_body).
#if defined(GPTFAST_HOPPER) || !defined(__CUDA_ARCH__)
#define HOPPER_BOUNDS(threads) __launch_bounds__(threads, 1)
#else
#define HOPPER_BOUNDS(threads) __launch_bounds__(32, 1)
#endif

namespace gptfast::cuda {

// dim[3] x dim[2] x dim[1] x dim[0] values, the last contiguous; stride in bytes, of dimensions 1 to 3.
struct TensorShape {
  const void* data;
  uint64_t dim[4], stride[3];
  DType dtype;
};
constexpr int kPanelBytes = 128;  // of a row
inline uint32_t panel_columns(DType dtype) { return kPanelBytes / (dtype == DType::f32 ? 4 : 2); }

#if !defined(CUDA_EMU)
// ---- device ---------------------------------------------------------------------------------------------------------
DEV_INLINE void mbarrier_init(uint32_t b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
DEV_INLINE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV_INLINE void mbarrier_expect(uint32_t b, int bytes) {  // and arrive
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
DEV_INLINE void mbarrier_arrive(uint32_t b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
}
DEV_INLINE void mbarrier_wait(uint32_t b, int parity) {  // until the phase of this parity is complete
  asm volatile("{ .reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra WAIT; }" ::"r"(b),
               "r"(parity)
               : "memory");
}
// The tile of `map` that starts at (x, y, z, w), innermost first; its bytes count on barrier b.
DEV_INLINE void tma_load(uint32_t to, const CUtensorMap* map, uint32_t b, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(map), "r"(b), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// The same way back: the tile to where it lies inside the tensor; tma_add adds it there, each value in one step. What threads
// wrote into the tile must be behind a fence_proxy_async of theirs and a barrier. The stores of a thread up to
// tma_commit are a group; the thread waits until at most N of its groups have not been read, or written, in full, and must
// not end before all have been read.
DEV_INLINE void tma_store(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}
DEV_INLINE void tma_add(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
      "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
DEV_INLINE void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> DEV_INLINE void tma_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> DEV_INLINE void tma_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
DEV_INLINE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int N> DEV_INLINE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEV_INLINE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
DEV_INLINE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// x, of which the compiler then knows nothing: what was packed into it need not live on beside it.
DEV_INLINE uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Byte n of the result is byte `order` >> 4 n & 7 of the eight bytes of a and b.
DEV_INLINE uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t order) { return __byte_perm(a, b, order); }
// Are the two 16-bit halves of a word at least those of `least`? One instruction.
DEV_INLINE void halves_at_least(uint32_t word, uint32_t least, bool& low, bool& high) {
  __vibmax_u16x2(word, least, &high, &low);
}

// ptxas moves a wait for products, which names no register, above the arithmetic before it, but not above this store of the
// result x of that arithmetic: what precedes it in the source then runs while the products do. `scratch`: 4 bytes of the thread.
DEV_INLINE void finish_before_wait(uint32_t scratch, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(scratch), "f"(x) : "memory");
}

// The map of tiles of `rows` rows of 128 bytes; false where the driver refuses it.
inline bool tensor_map(CUtensorMap* map, const TensorShape& x, uint32_t rows) {
  static const auto encode = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
  }();
  if (!encode) return false;
  const cuuint64_t dim[4] = {x.dim[0], x.dim[1], x.dim[2], x.dim[3]},
                   stride[3] = {x.stride[0], x.stride[1], x.stride[2]};
  const cuuint32_t box[4] = {panel_columns(x.dtype), rows, 1, 1}, step[4] = {1, 1, 1, 1};
  const auto type = x.dtype == DType::f32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : x.dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, type, 4, const_cast<void*>(x.data), dim, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#else
// ---- emulated: mbarrier and TMA -------------------------------------------------------------------------------------
struct EmuBarrier {  // the 8 bytes in shared memory
  int16_t arrivals, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(EmuBarrier) == 8);
inline EmuBarrier* emu_barrier(uint32_t b) { return reinterpret_cast<EmuBarrier*>(emu::smem_ptr(b, 8, 8, "mbarrier")); }
inline void emu_barrier_check(EmuBarrier* b) {
  if (b->pending < 0) emu::fail("mbarrier: more arrivals than its count");
  if (b->pending == 0 && b->bytes == 0) b->phase ^= 1, b->pending = b->arrivals, emu::B->progress++;
}
inline void mbarrier_init(uint32_t b, int arrivals) {
  [[maybe_unused]] const emu::Quiet quiet;
  *emu_barrier(b) = EmuBarrier{int16_t(arrivals), int16_t(arrivals), 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_expect(uint32_t b, int bytes) {
  [[maybe_unused]] const emu::Quiet quiet;
  EMU_RACE(emu::race::mb_release(b);)
  EmuBarrier* p = emu_barrier(b);
  p->bytes += bytes, p->pending--;
  emu_barrier_check(p);
}
inline void mbarrier_arrive(uint32_t b) { mbarrier_expect(b, 0); }
inline void mbarrier_wait(uint32_t b, int parity, EMU_SITE) {
  emu::B->cur->where = "mbarrier wait", emu::B->cur->line = emu_line;
  auto waiting = [&] {
    [[maybe_unused]] const emu::Quiet quiet;
    return int(emu_barrier(b)->phase) == parity;
  };
  while (waiting()) emu::spin_yield();
  EMU_RACE(emu::race::mb_acquire(b);)
}
struct EmuMap {
  TensorShape shape;
  uint32_t rows;
};
inline bool tensor_map(CUtensorMap* map, const TensorShape& x, uint32_t rows) {
  bool valid = emu::opt().maps && uintptr_t(x.data) % 16 == 0 && rows <= 256;
  for (uint64_t s : x.stride) valid = valid && s && s % 16 == 0 && s < 1ull << 40;
  for (uint64_t n : x.dim) valid = valid && n && n <= 1ull << 32;
  const EmuMap e{x, rows};
  static_assert(sizeof e <= sizeof *map);
  memcpy(static_cast<void*>(map), &e, sizeof e);
  return valid;
}
inline uint32_t emu_swizzle(uint32_t a) { return a ^ (a >> 3 & 0x70); }
inline EmuMap emu_map(const CUtensorMap* map, uint32_t smem, const char* what, int line) {
  emu::B->cur->where = what, emu::B->cur->line = line;
  EmuMap m;
  memcpy(&m, map, sizeof m);
  emu::smem_ptr(smem, m.rows * kPanelBytes, 1024, what);
  return m;
}
// f(offset in a panel, where the value lies in the tensor or null) for the values of the tile at (x, y, z, w).
template <class F> inline void emu_each_value(const EmuMap& m, int x, int y, int z, int w, F f) {
  const TensorShape& s = m.shape;
  const uint32_t columns = panel_columns(s.dtype), size = kPanelBytes / columns;
  for (uint32_t r = 0; r < m.rows; r++)
    for (uint32_t c = 0; c < columns; c++) {
      const uint64_t at[4] = {uint64_t(x) + c, uint64_t(y) + r, uint64_t(z), uint64_t(w)};
      char* there = static_cast<char*>(const_cast<void*>(s.data)) + at[0] * size;
      bool inside = at[0] < s.dim[0];
      for (int d = 1; d < 4; d++) inside = inside && at[d] < s.dim[d], there += at[d] * s.stride[d - 1];
      f(emu_swizzle(r * kPanelBytes + c * size), inside ? there : nullptr, size);
    }
}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t b, int x, int y, int z, int w, EMU_SITE) {
  const EmuMap m = emu_map(map, to, "TMA load", emu_line);
  const uint32_t bytes = m.rows * kPanelBytes;
  EMU_RACE(const int op = emu::race::tma_issue(emu::race::kLoads);)
  auto copy = [=] {
    [[maybe_unused]] const emu::Quiet quiet;
    EMU_RACE(emu::race::tma_done(op, b, to - emu::kSmemBase, bytes);)
    char* panel = emu::smem_ptr(to, bytes, 1024, "TMA load");
    emu_each_value(m, x, y, z, w, [&](uint32_t offset, const char* from, uint32_t size) {
      if (from) memcpy(panel + offset, from, size);
      else memset(panel + offset, 0, size);
    });
    EmuBarrier* p = emu_barrier(b);
    p->bytes -= int32_t(bytes);
    emu_barrier_check(p);
  };
  if (emu::opt().lazy) emu::B->async_q.push_back({copy});
  else copy();
}
template <class E> inline void emu_add(char* to, const char* from) {
  E sum, x;
  memcpy(&sum, to, sizeof sum), memcpy(&x, from, sizeof x);
  sum = E(float(sum) + float(x));
  memcpy(to, &sum, sizeof sum);
}
inline void emu_tma_store(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w, bool add, int line) {
  const EmuMap m = emu_map(map, from, add ? "TMA add" : "TMA store", line);
  const uint32_t bytes = m.rows * kPanelBytes;
  EMU_RACE(const int op = emu::race::tma_issue(emu::race::kStores);)
  auto taken = std::make_shared<std::vector<char> >();
  auto read = [=] {
    EMU_RACE(emu::race::tma_read(op, from - emu::kSmemBase, bytes);)
    const char* panel = emu::smem_ptr(from, bytes, 1024, "TMA store");
    taken->assign(panel, panel + bytes);
  };
  auto write = [=] {
    emu_each_value(m, x, y, z, w, [&](uint32_t offset, char* to, uint32_t size) {
      const char* value = taken->data() + offset;
      if (!to) return;
      if (!add) memcpy(to, value, size);
      else if (m.shape.dtype == DType::f32) emu_add<float>(to, value);
      else if (m.shape.dtype == DType::f16) emu_add<__half>(to, value);
      else emu_add<bf16>(to, value);
    });
  };
  emu::start_store({read, write, [=] { EMU_RACE(emu::race::tma_wait(op);) }});
}
inline void tma_store(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w, EMU_SITE) {
  emu_tma_store(map, from, x, y, z, w, false, emu_line);
}
inline void tma_add(const CUtensorMap* map, uint32_t from, int x, int y, int z, int w, EMU_SITE) {
  emu_tma_store(map, from, x, y, z, w, true, emu_line);
}
inline void tma_commit() { emu::commit_stores(); }
template <int N> inline void tma_wait_read() { emu::wait_for_stores(N, false); }
template <int N> inline void tma_wait() { emu::wait_for_stores(N, true); }
inline void fence_proxy_async() { EMU_RACE(emu::race::proxy_fence();) }
template <int N> inline void setmaxnreg_inc() { emu::set_registers(N); }
template <int N> inline void setmaxnreg_dec() { emu::set_registers(N); }
inline uint32_t opaque(uint32_t x) { return x; }
inline uint32_t bytes_of(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int n = 0; n < 4; n++) result |= uint32_t(both >> (order >> 4 * n & 7) * 8 & 0xff) << 8 * n;
  return result;
}
inline void halves_at_least(uint32_t word, uint32_t least, bool& low, bool& high) {
  low = (word & 0xffff) >= (least & 0xffff), high = word >> 16 >= least >> 16;
}
inline void finish_before_wait(uint32_t scratch, float x) {
  memcpy(emu::smem_ptr(scratch, 4, 4, "finish_before_wait"), &x, 4);
}
inline void named_barrier(int id, int threads, EMU_SITE) { emu::bar_sync(id, threads, emu_line); }
#endif

}  // namespace gptfast::cuda
