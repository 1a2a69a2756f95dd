// Where threads meet: warp and warpgroup collectives, barriers. Each lane leaves a pointer to its operands, which lie on
// its own stack; the last to arrive executes the instruction for all.
#pragma once

namespace emu {

// The lanes of `mask` meet; the last to arrive runs leader(mask, arg) over every lane's argument; then all go on.
template <class L> inline void collective(uint32_t mask, const char* what, int line, void* arg, L&& leader) {
  Fiber* me = B->cur;
  me->where = what, me->line = line;
  const uint32_t bit = 1u << me->lane;
  if (!(mask & bit)) fail("%s: calling lane %d is not in mask 0x%08x", what, me->lane, mask);
  mask &= B->alive[me->warp] | bit;
  auto& meets = B->meet[me->warp];
  Meet* m = nullptr;
  for (auto& x : meets) {
    if (x.mask == mask) {
      m = &x;
      break;
    }
    if (x.mask & bit) fail("%s: overlapping masks 0x%08x and 0x%08x (%s)", what, mask, x.mask, x.what);
  }
  if (!m) {
    meets.push_back(Meet{});
    m = &meets.back();
    m->mask = mask, m->what = what, m->line = line;
  }
  if (m->what != what && strcmp(m->what, what))
    fail("divergent warp collective: lane %d is at %s:%d, others of mask 0x%08x are at %s:%d", me->lane, what, line,
         mask, m->what, m->line);
  if (m->line != line) fail("divergent warp collective %s: lines %d and %d", what, line, m->line);
  m->arg[me->lane] = arg;
  m->arrived |= bit;
  if (m->arrived != mask) return block_me();
  leader(mask, m->arg);
  B->ready[me->warp] |= mask;
  meets.erase(meets.begin() + (m - meets.data()));
}

// The 128 lanes of a warpgroup meet: leader(warpgroup, arg).
template <class L> inline void wg_collective(const char* what, int line, void* arg, L&& leader) {
  Fiber* me = B->cur;
  me->where = what, me->line = line;
  const int g = me->warp / 4, l = me->lin % 128;
  WgMeet& m = B->wg[g];
  if (m.arrived && strcmp(m.what, what)) fail("divergent warpgroup operation: %s against %s", what, m.what);
  m.what = what;
  m.arg[l] = arg;
  if (++m.arrived < 128) return block_me();
  m.arrived = 0;
  leader(g, m.arg);
  for (int w = g * 4; w < g * 4 + 4; w++) B->ready[w] = 0xffffffffu;
}

inline void maybe_release(Barrier& b) {
  if (!b.expected || b.arrived < b.expected) return;
  EMU_RACE(race::barrier(b.seen, b.waiting);)
  for (int w = 0; w < B->nwarps; w++) B->ready[w] |= b.waiting[w];
  b = Barrier{};
  B->progress++;
}
// bar.sync (or bar.arrive) of barrier `id` for `count` threads; 0 is __syncthreads.
inline void bar_sync(int id, int count, int line, bool wait = true) {
  Fiber* me = B->cur;
  me->where = "barrier", me->line = line;
  Barrier& b = B->bar[id];
  if (!b.expected) b.expected = count;
  if (count != b.expected && id) fail("barrier %d: thread count %d against %d", id, count, b.expected);
  if (b.waiting[me->warp] && b.site[me->warp] != line)
    fail("divergent barrier %d inside warp %d: lines %d and %d", id, me->warp, b.site[me->warp], line);
  b.site[me->warp] = line;
  b.seen |= 1u << me->warp;
  b.arrived++;
  if (wait) b.waiting[me->warp] |= 1u << me->lane, B->ready[me->warp] &= ~(1u << me->lane);
  maybe_release(b);
  if (wait) reschedule();
}

// ---- TMA stores: each does its parts as late as it may, or at once ---------------------------------------------------

inline void finish(std::function<void()>& part) {
  [[maybe_unused]] const Quiet quiet;
  if (part) part();
  part = nullptr;
}
inline void start_store(Store store) {
  if (!opt().lazy) finish(store.read), finish(store.write);
  B->cur->store_open.push_back(std::move(store));
}
inline void commit_stores() {
  B->cur->store_group.push_back({std::move(B->cur->store_open)});
  B->cur->store_open.clear();
}
// Until at most `most` groups of this thread have not been read (written).
inline void wait_for_stores(int most, bool written) {
  auto& groups = B->cur->store_group;
  for (int i = 0; i < int(groups.size()) - most; i++) {
    for (Store& s : groups[size_t(i)].stores) {
      finish(s.read), finish(s.known);
      if (written) finish(s.write);
    }
    groups[size_t(i)].known = true;
  }
}
// At the end of a thread: its shared memory goes to another block.
inline void check_stores() {
  Fiber& me = *B->cur;
  bool known = me.store_open.empty();
  for (const StoreGroup& g : me.store_group) known = known && g.known;
  if (!known) fail("the thread ends while a TMA store may still read shared memory; wait for it (tma_wait_read)");
  for (StoreGroup& g : me.store_group)
    for (Store& s : g.stores) finish(s.write);
}

// ---- kernels that start before the one before them has ended -------------------------------------------------------------

// Until all threads of the block wait, what the kernel before writes is nan.
inline void begin_early(Block& b) {
  b.early = true;
  for (const Span& span : opt().late) {
    b.written.emplace_back(span.data, span.data + span.bytes);
    memset(span.data, 0xff, span.bytes);
  }
}
inline void earlier_kernels_end(Block& b) {
  for (size_t i = 0; i < b.written.size(); i++) memcpy(opt().late[i].data, b.written[i].data(), b.written[i].size());
  b.written.clear();
}
inline void wait_for_earlier_kernels(int line) {
  Fiber* me = B->cur;
  if (!B->early || me->waited) return;
  me->waited = true, me->where = "wait_for_earlier_kernels", me->line = line;
  if (++B->waiting < B->live) {
    B->ready[me->warp] &= ~(1u << me->lane), B->at_wait[me->warp] |= 1u << me->lane;
    return reschedule();
  }
  earlier_kernels_end(*B);
  for (int w = 0; w < B->nwarps; w++) B->ready[w] |= B->at_wait[w], B->at_wait[w] = 0;
  B->progress++;
}
inline void let_next_kernel_start(int line) {
  B->cur->where = "let_next_kernel_start", B->cur->line = line;
  if (B->early && !B->cur->waited) fail("the next kernel may start before this one has waited for earlier ones");
}

// ---- registers ------------------------------------------------------------------------------------------------------

// This thread's warpgroup goes on with so many registers a thread. Once all have said so, they must fit into what the
// block got at its launch, or the last would wait for ever.
inline void set_registers(int count) {
  const int groups = B->nwarps / 4, launched = 65536 / B->nthreads / 8 * 8;
  B->registers[B->cur->warp / 4] = count;
  int sum = 0;
  for (int g = 0; g < groups; g++) {
    if (!B->registers[g]) return;
    sum += B->registers[g];
  }
  if (sum > groups * launched)
    fail("setmaxnreg: %d warpgroups ask for %d registers, %d a thread were launched", groups, sum, launched);
}

// ---- addresses ------------------------------------------------------------------------------------------------------

inline void expect_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned address %p: a %zu-byte access", p, bytes);
}

// ---- the shared window: 32-bit addresses, as __cvta_generic_to_shared gives ---------------------------------------

inline uint32_t smem_u32(const void* p) {
  const ptrdiff_t d = static_cast<const char*>(p) - B->smem;
  if (d < 0 || d > ptrdiff_t(B->smem_bytes)) fail("smem_u32: pointer is not in dynamic shared memory");
  return kSmemBase + uint32_t(d);
}
inline char* smem_ptr(uint32_t a, uint32_t bytes, uint32_t align, const char* what) {
  if (a < kSmemBase || size_t(a) - kSmemBase + bytes > B->smem_bytes)
    fail("%s: shared address 0x%x (+%u bytes) is outside the %zu bytes of dynamic shared memory", what, a, bytes,
         B->smem_bytes);
  if (a % align) fail("%s: shared address 0x%x is not %u-byte aligned", what, a, align);
  return B->smem + (a - kSmemBase);
}
template <class T> inline T* dyn_smem() { return reinterpret_cast<T*>(B->smem); }

}  // namespace emu
