// Launching: the blocks of a grid, one at a time per OS thread, each with the stacks of its threads.
#pragma once
#include "stack_overflow.h"

namespace emu {

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!B->main_bottom) B->main_bottom = bottom, B->main_size = size;
#endif
  B->body();
  check_stores();
  Fiber* me = B->cur;
  if (B->early && !me->waited) fail("the thread ends without a wait for earlier kernels (wait_for_earlier_kernels)");
  me->done = true;
  me->where = "exit";
  B->live--;
  B->alive[me->warp] &= ~(1u << me->lane);
  B->ready[me->warp] &= ~(1u << me->lane);
  if (B->bar[0].expected) {  // threads that exited no longer count for __syncthreads
    B->bar[0].expected = B->live;
    maybe_release(B->bar[0]);
  }
  B->progress++;
  if (B->live == 0) leave_to_main();
  reschedule();
  abort();
}

struct Worker {  // per OS thread: stacks are reused from block to block
  Block b;
  std::vector<char*> stacks;
  Worker() { report_stack_overflows(); }
  ~Worker() {
    for (char* s : stacks) munmap(s - kGuard, kStack + kGuard);
  }
  char* stack(size_t i) {
    while (stacks.size() <= i) {
      void* p =
          mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::bad_alloc();
      mprotect(p, kGuard, PROT_NONE);
      stacks.push_back(static_cast<char*>(p) + kGuard);
    }
    return stacks[i];
  }
  void make_fiber(int i, dim3 block) {
    Fiber& f = b.f[size_t(i)];
    f.stack = stack(size_t(i));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(f.stack, kStack);  // the last thread's frames never returned
#endif
    f.lin = i, f.warp = i / 32, f.lane = i % 32;
    f.tid = uint3{unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / (block.x * block.y)};
    void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
    *--top = nullptr;                               // alignment: (rsp + 8) % 16 == 0 at function entry
    *--top = reinterpret_cast<void*>(&fiber_main);  // return address
    for (int k = 0; k < 6; k++) *--top = nullptr;
    f.sp = top;
  }
  void run_block(dim3 grid, dim3 block, uint3 index, size_t smem, const std::function<void()>& body, bool early) {
    b = Block{};
    B = &b;
    if (early) begin_early(b);
    b.nthreads = int(block.x * block.y * block.z);
    b.nwarps = (b.nthreads + 31) / 32;
    b.live = b.nthreads;
    b.body = body;
    b.rng = 0x9E3779B97F4A7C15ull * (opt().seed + 1) + index.x * 7919 + index.y * 104729 + index.z;
    // Exactly the requested bytes: AddressSanitizer sees one byte too far.
    void* raw = nullptr;
    if (smem && posix_memalign(&raw, 1024, smem)) throw std::bad_alloc();
    const std::unique_ptr<void, void (*)(void*)> owner(raw, free);
    b.smem = static_cast<char*>(raw), b.smem_bytes = smem;
    EMU_RACE(race::reset(b.smem, smem);)
    if (smem && opt().poison) memset(raw, 0xff, smem);  // NaN in fp32, fp16 and bf16
    blockDim = block, gridDim = grid, blockIdx = index;
    b.f.resize(size_t(b.nwarps) * 32);
    for (int w = 0; w < b.nwarps; w++) {
      const int n = std::min(32, b.nthreads - 32 * w);
      b.ready[w] = b.alive[w] = n == 32 ? 0xffffffffu : (1u << n) - 1;
      b.spin[w] = 0;
    }
    for (int i = 0; i < b.nthreads; i++) make_fiber(i, block);
    enter(pick(), &b.main_sp, &b.main_fake);
    resumed(b.main_fake);
    B = nullptr;
    earlier_kernels_end(b);
    if (!b.error.empty()) throw std::runtime_error("emu: " + b.error);
  }
};

// What a GPU refuses to launch.
inline void check_launch(dim3 grid, dim3 block, size_t smem) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) throw std::runtime_error("emu: launch with a bad block size");
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("emu: launch with a bad grid size");
  if (smem > 227 << 10) throw std::runtime_error("emu: launch with more than 227 KB of shared memory");
}

template <class... P, class... A>
inline void run(bool early, void (*k)(P...), dim3 grid, dim3 block, size_t smem, A&&... a) {
  check_launch(grid, block, smem);
  std::tuple<std::decay_t<P>...> args(std::forward<A>(a)...);
  const std::function<void()> body = [&] { std::apply(k, args); };
  const size_t n = size_t(grid.x) * grid.y * grid.z;
  std::atomic<size_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  auto work = [&] {
    static thread_local Worker w;
    try {
      for (size_t i; (i = next++) < n;) {
        const size_t j = opt().order == 1 ? n - 1 - i : i;
        const size_t y = j / grid.x, z = y / grid.y;
        w.run_block(grid, block, uint3{unsigned(j % grid.x), unsigned(y % grid.y), unsigned(z)}, smem, body, early);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
      next = n;
    }
  };
  std::vector<std::thread> pool;
  const size_t threads = early && !opt().late.empty() ? 1 : size_t(opt().threads);  // blocks share what is late
  for (size_t i = 1; i < std::min(threads, n); i++) pool.emplace_back(work);
  work();
  for (auto& p : pool) p.join();
  if (error) std::rethrow_exception(error);
}
template <class... P, class... A> inline void launch(void (*k)(P...), dim3 grid, dim3 block, size_t smem, A&&... a) {
  run(false, k, grid, block, smem, std::forward<A>(a)...);
}
template <class... P, class... A>
inline void launch_early(void (*k)(P...), dim3 grid, dim3 block, size_t smem, A&&... a) {
  run(true, k, grid, block, smem, std::forward<A>(a)...);
}

}  // namespace emu
