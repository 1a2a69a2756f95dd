// Happens-before checking of dynamic shared memory, and of the proxy-fence rule of asynchronous copies and wgmma.
//
// Kernels are compiled with  -DEMU_RACECHECK -fsanitize=thread -c;  this file and the link are not: g++ then calls
// __tsan_readN and __tsan_writeN at every load and store, and this file answers them with vector clocks.
// Agents: warps 0 .. 31, the wgmma engine of each warpgroup 32 .. 39, TMA's loads 40 and stores 41. Clocks are per warp, so what one
// lane releases is credited to its warp; lanes of one warp are told apart by __syncwarp and barriers only.
#include "racecheck.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <deque>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {
[[noreturn]] void race_fail(const char* msg);  // defined by the emulated code
namespace race {

thread_local int quiet = 0;
namespace {

constexpr int kAgents = 42, kWgmma = 32;
constexpr uint8_t kManyLanes = 0xff;
constexpr size_t kGrain = 2;  // bytes that share a cell: no kernel here writes single bytes
using Clock = std::array<uint32_t, kAgents>;
struct Cell {  // the last write, and the last read by each agent
  uint32_t w_epoch;
  int16_t w_agent;
  uint8_t w_lane;
  bool w_generic;
  void* w_pc;
  uint32_t r_epoch[kAgents];
  uint8_t r_lane[kAgents];
  void* r_pc;
};
struct Started {  // an asynchronous copy or product: what was known when it started, whenever it reads and writes
  int agent;
  Clock known;
  uint32_t epoch;
};

thread_local const char* base;
thread_local size_t size;
thread_local int warp = -1, lane;
thread_local std::vector<Cell> cell;
thread_local Clock vc[kAgents];
thread_local uint32_t clk[kAgents], fenced[kWgmma][32];  // fenced: by warp and lane, as each fences its own writes
thread_local std::unordered_map<uint32_t, Clock> mb;
thread_local std::vector<Started> copies, products;
thread_local std::deque<Clock>
    groups[kAgents - kWgmma];  // of each warpgroup: what its warps learn when the group is done

void join(Clock& a, const Clock& b) {
  for (int i = 0; i < kAgents; i++) a[i] = std::max(a[i], b[i]);
}
// What others learn of agent a when it releases: all it knows, and its own accesses so far.
Clock release(int a) {
  Clock c = vc[a];
  c[a] = clk[a]++;
  vc[a][a] = c[a];
  return c;
}

std::string place(void* pc) {
  Dl_info i;
  if (!pc || !dladdr(pc, &i)) return "emulated instruction";
  char s[320];
  snprintf(s, sizeof s, "%s+0x%zx", i.dli_fname, size_t(static_cast<char*>(pc) - static_cast<char*>(i.dli_fbase) - 1));
  return s;
}
std::string agent_name(int a, int l) {
  if (a >= kLoads) return a == kLoads ? "TMA load" : "TMA store";
  if (a >= kWgmma) return "wgmma of warpgroup " + std::to_string(a - kWgmma);
  return "warp " + std::to_string(a) + (l == kManyLanes ? "" : " lane " + std::to_string(l));
}
struct Access {
  int agent, lane;
  void* pc;
};
void report(const char* kind, size_t off, const Access& now, const Access& before) {
  const std::string m = std::string("RACE ") + kind + " on shared byte " + std::to_string(off) + ": " +
                        agent_name(now.agent, now.lane) + " (" + place(now.pc) + ") against " +
                        agent_name(before.agent, before.lane) + " (" + place(before.pc) + ")";
  race_fail(m.c_str());
}

// An access by `now`, which knows `known`, to n bytes: every earlier access that conflicts must be known to it.
void check(const Access& now, const Clock& known, uint32_t epoch, size_t off, size_t n, bool write, bool async) {
  const int a = now.agent;
  const auto ordered = [&](int b, int l, uint32_t e) {
    return e <= known[b] || (b == a && a < kWgmma && l == now.lane);
  };
  for (size_t i = off / kGrain; i < (off + n + kGrain - 1) / kGrain && i < cell.size(); i++) {
    Cell& x = cell[i];
    const Access writer{x.w_agent, x.w_lane, x.w_pc};
    if (x.w_agent >= 0 && !ordered(x.w_agent, x.w_lane, x.w_epoch))
      report(write ? "write/write" : "write/read", off, now, writer);
    if (x.w_agent >= 0 && !write && async && x.w_generic && x.w_epoch > fenced[x.w_agent][x.w_lane])
      report("(no fence.proxy.async)", off, now, writer);
    if (write) {
      for (int b = 0; b < kAgents; b++)
        if (x.r_epoch[b] && !ordered(b, x.r_lane[b], x.r_epoch[b]))
          report("read/write", off, now, {b, x.r_lane[b], x.r_pc});
      x = Cell{};
      x.w_agent = int16_t(a), x.w_lane = uint8_t(now.lane), x.w_epoch = epoch, x.w_generic = !async, x.w_pc = now.pc;
    } else {
      x.r_lane[a] = x.r_epoch[a] == epoch && x.r_lane[a] != now.lane ? kManyLanes : uint8_t(now.lane);
      x.r_epoch[a] = epoch, x.r_pc = now.pc;
    }
  }
}
void touch(const void* p, size_t n, bool write, void* pc) {
  const size_t off = size_t(static_cast<const char*>(p) - base);
  if (warp < 0 || quiet || off >= size) return;
  check({warp, lane, pc}, vc[warp], clk[warp], off, n, write, false);
}

}  // namespace

void reset(const char* p, size_t n) {
  base = p, size = n, warp = -1, quiet = 0;
  Cell untouched{};
  untouched.w_agent = -1;
  cell.assign((n + kGrain - 1) / kGrain, untouched);
  for (int a = 0; a < kAgents; a++) vc[a] = Clock{}, clk[a] = 1;
  memset(fenced, 0, sizeof fenced);
  mb.clear();
  copies.clear();
  products.clear();
  for (auto& of_warpgroup : groups) of_warpgroup.clear();
}
void current(int w, int l) { warp = w, lane = l; }
void barrier(uint32_t arrived, const uint32_t* waiting) {
  Clock c{};
  for (int w = 0; w < 32; w++)
    if (arrived >> w & 1) join(c, release(w));
  for (int w = 0; w < 32; w++)
    if (waiting[w]) join(vc[w], c);
}
void sync_warp(int w) { release(w); }
void access(int l, size_t off, size_t n, bool write) {
  check({warp, l < 0 ? lane : l, nullptr}, vc[warp], clk[warp], off, n, write, false);
}
void mb_release(uint32_t bar) { join(mb[bar], release(warp)); }
void mb_acquire(uint32_t bar) { join(vc[warp], mb[bar]); }
void proxy_fence() {
  fenced[warp][lane] = clk[warp];
  release(warp);
}
int tma_issue(Engine engine) {
  copies.push_back({engine, release(warp), clk[engine]++});
  return int(copies.size()) - 1;
}
void tma_done(int id, uint32_t bar, size_t off, size_t n) {
  const Started& copy = copies[size_t(id)];
  check({kLoads, 0, nullptr}, copy.known, copy.epoch, off, n, true, true);
  Clock c = copy.known;
  c[kLoads] = std::max(c[kLoads], copy.epoch);
  join(mb[bar], c);
}
void tma_read(int id, size_t off, size_t n) {
  const Started& copy = copies[size_t(id)];
  check({copy.agent, 0, nullptr}, copy.known, copy.epoch, off, n, false, true);
}
void tma_wait(int id) {
  const Started& copy = copies[size_t(id)];
  vc[warp][copy.agent] = std::max(vc[warp][copy.agent], copy.epoch);
}
int wg_issue(int g) {
  const int agent = kWgmma + g;
  for (int w = g * 4; w < g * 4 + 4; w++) join(vc[agent], release(w));
  products.push_back({agent, vc[agent], clk[agent]});
  return int(products.size()) - 1;
}
void wg_read(int id, size_t off, size_t n) {
  const Started& product = products[size_t(id)];
  check({product.agent, 0, nullptr}, product.known, product.epoch, off, n, false, true);
}
void wg_commit(int g) { groups[g].push_back(release(kWgmma + g)); }
void wg_wait(int g, int left) {
  for (; int(groups[g].size()) > left; groups[g].pop_front())
    for (int w = g * 4; w < g * 4 + 4; w++) join(vc[w], groups[g].front());
}

}  // namespace race
}  // namespace emu

// ---- what g++ -fsanitize=thread calls ---------------------------------------------------------------------------------

#define PC __builtin_return_address(0)
#define ACCESS(name, n, write) \
  void __tsan_##name##n(void* p) { emu::race::touch(p, n, write, PC); }
#define ACCESSES(n)                \
  ACCESS(read, n, false)           \
  ACCESS(write, n, true)           \
  ACCESS(unaligned_read, n, false) \
  ACCESS(unaligned_write, n, true) \
  ACCESS(volatile_read, n, false)  \
  ACCESS(volatile_write, n, true)
#define ATOMICS(b, T)                                                                             \
  T __tsan_atomic##b##_load(const volatile T* p, int) { return __atomic_load_n(p, 5); }           \
  void __tsan_atomic##b##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, 5); }           \
  T __tsan_atomic##b##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, 5); } \
  T __tsan_atomic##b##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, 5); } \
  T __tsan_atomic##b##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, 5); } \
  int __tsan_atomic##b##_compare_exchange_strong(volatile T* p, T* c, T v, int, int) {            \
    return __atomic_compare_exchange_n(p, c, v, false, 5, 5);                                     \
  }                                                                                               \
  int __tsan_atomic##b##_compare_exchange_weak(volatile T* p, T* c, T v, int, int) {              \
    return __atomic_compare_exchange_n(p, c, v, false, 5, 5);                                     \
  }                                                                                               \
  T __tsan_atomic##b##_compare_exchange_val(volatile T* p, T c, T v, int, int) {                  \
    __atomic_compare_exchange_n(p, &c, v, false, 5, 5);                                           \
    return c;                                                                                     \
  }
extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
ATOMICS(8, unsigned char)
ATOMICS(16, unsigned short)
ATOMICS(32, unsigned int)
ATOMICS(64, unsigned long)
void __tsan_read_range(void* p, size_t n) { emu::race::touch(p, n, false, PC); }
void __tsan_write_range(void* p, size_t n) { emu::race::touch(p, n, true, PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) {}
}
