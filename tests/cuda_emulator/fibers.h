// Fibers and their scheduler: each CUDA thread of a block has a stack of its own and runs until it has to wait.
#pragma once
#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
extern "C" void __asan_unpoison_memory_region(const void volatile*, size_t);
#endif

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim{}, gridDim{};
inline constexpr int warpSize = 32;

namespace emu {

struct Span {  // of global memory
  char* data;
  size_t bytes;
};
struct Options {
  int order = 0;  // 0 fwd, 1 rev, 2 rand
  unsigned seed = 1;
  bool lazy = true, lazy_mma = true, poison = true;
  int threads = 1;
  std::vector<Span> late;                // what the kernel before an early one writes as late as it can
  bool hopper_code = true, maps = true;  // false: the library was built without sm_90a; the driver makes no TMA map
};
inline Options& opt() {
  static Options o = [] {
    Options r;
    if (const char* e = getenv("EMU_ORDER")) r.order = !strcmp(e, "rev") ? 1 : !strcmp(e, "rand") ? 2 : 0;
    if (const char* e = getenv("EMU_SEED")) r.seed = unsigned(atoi(e));
    if (const char* e = getenv("EMU_COPY")) r.lazy = strcmp(e, "eager") != 0;
    if (const char* e = getenv("EMU_MMA")) r.lazy_mma = strcmp(e, "eager") != 0;
    if (const char* e = getenv("EMU_POISON")) r.poison = atoi(e) != 0;
    if (const char* e = getenv("EMU_THREADS")) r.threads = std::max(1, atoi(e));
#if defined(__SANITIZE_ADDRESS__)
    r.threads = 1;
#endif
    return r;
  }();
  return o;
}

// Saves the six callee-saved registers on this stack and takes up the other one; no system call.
__attribute__((naked, noinline, noipa, no_sanitize("address", "undefined"))) inline void ctx_switch(void** /*save*/,
                                                                                                    void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n\t"
      "movq %rsp,(%rdi); movq %rsi,%rsp\n\t"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

struct Pending {  // one asynchronous operation
  std::function<void()> run;
};
struct Store {                               // a copy out of shared memory: it reads, and later writes
  std::function<void()> read, write, known;  // known: the thread has waited until it was read
};
struct StoreGroup {
  std::vector<Store> stores;
  bool known = false;
};
struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake = nullptr;  // AddressSanitizer's
  uint3 tid{};
  int lin = 0, warp = 0, lane = 0;
  bool done = false;
  const char* where = "start";  // what it waits for, and in which line
  int line = 0;
  bool waited = false;                         // for earlier kernels
  std::vector<Pending> cp_open;                // cp.async not yet committed
  std::vector<std::vector<Pending>> cp_group;  // committed groups, oldest first
  std::vector<Store> store_open;               // the same of TMA stores
  std::vector<StoreGroup> store_group;
};
struct Meet {  // a rendezvous of a set of lanes of one warp
  uint32_t mask = 0, arrived = 0;
  const char* what = nullptr;
  int line = 0;
  void* arg[32];
};
struct Barrier {
  int expected = 0, arrived = 0;
  uint32_t waiting[32] = {};  // lanes per warp
  uint32_t seen = 0;          // warps that arrived
  int site[32] = {};          // line per warp, to catch divergent barriers
};
struct WgMeet {  // a rendezvous of a warpgroup
  int arrived = 0;
  const char* what = nullptr;
  void* arg[128];
};

constexpr size_t kStack =
#if defined(__SANITIZE_ADDRESS__) || !defined(__OPTIMIZE__)
    512 << 10;
#else
    128 << 10;
#endif
constexpr size_t kGuard = 4096;       // below every stack: an overflow faults there
constexpr uint32_t kSmemBase = 1024;  // shared-window address of dynamic shared memory (as on sm_90)

struct Block {
  std::vector<Fiber> f;
  int nthreads = 0, nwarps = 0, live = 0;
  uint32_t ready[32], spin[32], alive[32];  // lanes per warp
  std::vector<Meet> meet[32];
  Barrier bar[16];
  WgMeet wg[8];
  bool wg_fenced[8] = {};  // since the last wait
  bool early = false;      // launched before the kernel before it had ended
  int waiting = 0;         // threads that wait for that
  uint32_t at_wait[32] = {};
  std::vector<std::vector<char>> written;  // what that kernel writes
  std::vector<Pending> wg_open[8];
  std::vector<std::vector<Pending>> wg_group[8];
  std::vector<Pending> async_q;  // TMA loads in flight
  int registers[8] = {};         // of a thread, by warpgroup; 0: as launched
  char* smem = nullptr;
  size_t smem_bytes = 0;
  void* main_sp = nullptr;
  void* main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  Fiber* cur = nullptr;
  uint64_t rng = 1, progress = 0, last_spin_progress = ~0ull;
  std::function<void()> body;
  std::string error;
};
inline thread_local Block* B = nullptr;

inline uint64_t rnd() {
  B->rng ^= B->rng << 13;
  B->rng ^= B->rng >> 7;
  B->rng ^= B->rng << 17;
  return B->rng;
}

inline void enter(Fiber* to, void** save, [[maybe_unused]] void** fake_save) {
  B->cur = to;
  threadIdx = to->tid;
  EMU_RACE(race::current(to->warp, to->lane);)
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_save, to->stack, kStack);
#endif
  ctx_switch(save, to->sp);  // back here later, possibly on another path
}
inline void resumed([[maybe_unused]] void* fake) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
inline void leave_to_main() {
  Fiber* me = B->cur;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(me->done ? nullptr : &me->fake, B->main_bottom, B->main_size);
#endif
  ctx_switch(&me->sp, B->main_sp);
  resumed(me->fake);
}

// Ends the launch: the message names block, thread and place, and is thrown from emu::launch.
[[noreturn]] inline void fail(const char* fmt, ...) {
  char buf[1024];
  va_list ap;
  va_start(ap, fmt);
  vsnprintf(buf, sizeof buf, fmt, ap);
  va_end(ap);
  if (!B || !B->cur) throw std::runtime_error(std::string("emu: ") + buf);
  char head[256];
  const Fiber& me = *B->cur;
  snprintf(head, sizeof head, "block (%u,%u,%u) thread (%u,%u,%u) near %s:%d: ", blockIdx.x, blockIdx.y, blockIdx.z,
           me.tid.x, me.tid.y, me.tid.z, me.where, me.line);
  B->error = std::string(head) + buf;
  leave_to_main();  // never resumed
  abort();
}
EMU_RACE([[noreturn]] void race_fail(const char* msg);)
EMU_RACE([[noreturn]] inline __attribute__((used)) void race_fail(const char* msg) { fail("%s", msg); })

struct Quiet {  // emulator code touches shared memory on an instruction's behalf
  EMU_RACE(Quiet() { race::quiet++; } ~Quiet() { race::quiet--; })
};

inline int pick_lane(uint32_t m) {
  if (opt().order == 0) return __builtin_ctz(m);
  if (opt().order == 1) return 31 - __builtin_clz(m);
  const unsigned r = rnd() & 31;
  const uint32_t rotated = (m >> r) | (r ? m << (32 - r) : 0);
  return (__builtin_ctz(rotated) + r) & 31;
}
// Who runs next: this warp as far as it can, then another; nullptr at a deadlock.
inline Fiber* pick() {
  for (;;) {
    int w = B->cur ? B->cur->warp : -1;
    if (w >= 0 && B->ready[w] && !(opt().order == 2 && (rnd() & 15) == 0))
      return &B->f[w * 32 + pick_lane(B->ready[w])];
    uint32_t warps = 0;
    for (int i = 0; i < B->nwarps; i++) warps |= uint32_t(B->ready[i] != 0) << i;
    if (warps) {
      w = pick_lane(warps);
      return &B->f[w * 32 + pick_lane(B->ready[w])];
    }
    if (!B->async_q.empty()) {  // nothing can run: let one asynchronous copy land
      const size_t last = B->async_q.size() - 1;
      const size_t i = opt().order == 2 ? rnd() % (last + 1) : opt().order == 1 ? last : 0;
      Pending p = std::move(B->async_q[i]);
      B->async_q.erase(B->async_q.begin() + long(i));
      p.run();
      B->progress++;
    }
    bool any = false;
    for (int i = 0; i < B->nwarps; i++) any |= B->spin[i] != 0;
    if (!any || B->last_spin_progress == B->progress) return nullptr;
    B->last_spin_progress = B->progress;
    for (int i = 0; i < B->nwarps; i++) B->ready[i] |= B->spin[i], B->spin[i] = 0;
  }
}
[[noreturn]] inline void fail_deadlock() {
  std::string s = "deadlock;";
  int shown = 0;
  for (int i = 0; i < B->nthreads && shown < 6; i++) {
    const Fiber& f = B->f[size_t(i)];
    if (f.done || (i % 32 && f.line == B->f[size_t(i) - 1].line)) continue;
    s += " thread " + std::to_string(i) + " waits at " + f.where + ":" + std::to_string(f.line) + ";";
    shown++;
  }
  fail("%s", s.c_str());
}
// Gives the processor away; the caller has set this fiber's state.
inline void reschedule() {
  Fiber* me = B->cur;
  Fiber* next = pick();
  if (next == me) return;
  if (!next) fail_deadlock();
  enter(next, &me->sp, me->done ? nullptr : &me->fake);
  resumed(me->fake);
}
inline void block_me() {
  B->ready[B->cur->warp] &= ~(1u << B->cur->lane);
  reschedule();
}
inline void spin_yield() {
  Fiber* me = B->cur;
  B->ready[me->warp] &= ~(1u << me->lane);
  B->spin[me->warp] |= 1u << me->lane;
  reschedule();
}

}  // namespace emu
