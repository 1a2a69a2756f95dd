// Forward of causal_attention on Hopper, head dims up to 128 in 16 bits: the sums of causal_attention_fwd.cu by TMA
// and wgmma (FlashAttention-3, arXiv 2407.08608). Warpgroup 0 loads tiles of k and v into rings of STAGES buffers; every
// other warpgroup has 64 queries of one head. Within one of these the product of the weights of tile i with v runs
// under the softmax of tile i + 1.
//
// Where a task, BM queries of a head, is short, blocks stay and take one after another (Schedule): the rings go on from one to
// the next, and queries have two buffers. The other three warps of warpgroup 0 look for nan and inf in tiles of v with masked
// elements, so that nobody else reads them.
//
// Barriers in shared memory: of each buffer, q has landed, and what was written over it has left; of each stage, k (v) has
// landed, v has been looked at, and k (v) has been used.
#pragma once
#include "causal_attention_dropout_sm90.cuh"
#include "causal_attention_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class E_, int D_, int CONSUMERS_> struct HopperShape {
  using E = E_;
  static constexpr int D = D_, CONSUMERS = CONSUMERS_, BM = 64 * CONSUMERS, BN = 128, STAGES = D == 64 ? 4 : 2;
  static constexpr int Q_BYTES = BM * D * 2, K_BYTES = BN * D * 2, THREADS = 128 * (CONSUMERS + 1);
  static constexpr int BARRIERS = 4 + 5 * STAGES, WARPS = 4 * CONSUMERS, SCANNERS = 3;
  static constexpr int RANGES = 20, PART_BYTES = RANGES * int(sizeof(Range)) + 16 + 128;
  static constexpr int SMEM =
      2 * Q_BYTES + 2 * STAGES * K_BYTES + BARRIERS * 8 + WARPS * PART_BYTES + SCANNERS * STAGES * int(sizeof(int));
};
struct HopperMaps {
  CUtensorMap q, k, v, y;
};

template <class C, bool DROPOUT>
__global__ void HOPPER_BOUNDS(C::THREADS)
    attention_forward_sm90(const __grid_constant__ AttentionParams p, const __grid_constant__ HopperMaps maps,
                           const __grid_constant__ HopperDropout dropout, const __grid_constant__ Schedule schedule) {
#if defined(GPTFAST_HOPPER)
  using E = typename C::E;
  constexpr int D = C::D, BM = C::BM, BN = C::BN, STAGES = C::STAGES, CONSUMERS = C::CONSUMERS, PANELS = D / 64;
  DYN_SMEM(smem);
  char* const k_data = smem + 2 * C::Q_BYTES;
  char* const v_data = k_data + STAGES * C::K_BYTES;
  char* const after_tiles = v_data + STAGES * C::K_BYTES;
  const uint32_t q_at = smem_u32(smem), k_at = smem_u32(k_data), v_at = smem_u32(v_data);
  const uint32_t barriers = smem_u32(after_tiles);
  auto q_full = [&](int turn) { return barriers + turn % 2 * 8; };
  auto q_free = [&](int turn) { return barriers + (2 + turn % 2) * 8; };
  auto k_full = [&](int stage) { return barriers + (4 + stage) * 8; };
  auto v_full = [&](int stage) { return barriers + (4 + STAGES + stage) * 8; };
  auto k_free = [&](int stage) { return barriers + (4 + 2 * STAGES + stage) * 8; };
  auto v_free = [&](int stage) { return barriers + (4 + 3 * STAGES + stage) * 8; };
  auto v_seen = [&](int stage) { return barriers + (4 + 4 * STAGES + stage) * 8; };
  char* const parts = after_tiles + C::BARRIERS * 8;  // of each warp of queries: what its rows see, a float
  int* dirty =
      reinterpret_cast<int*>(parts + C::WARPS * C::PART_BYTES);  // of each stage and scanning warp: has v nan or inf?

  // Tasks: BM queries of a head each, late queries, which see the most keys, first.
  struct Task {
    int turn, bh, i0;
  };
  struct
      Tiles {  // from right to left, so those with masked elements first: columns `last`, … `first`, none if last < first
    int first, last, low, high;  // keys from `low` on, before `high`, are seen by all queries of the block
    DEV_INLINE Tiles(Range of_first, Range of_last)
        : first(of_first.lo / BN * BN), last((of_last.hi - 1) / BN * BN), low(of_last.lo), high(of_first.hi) {
      if (of_last.hi <= first) last = first - BN;
    }
    DEV_INLINE bool is_edge(int at) const { return at < low || at + BN > high; }
  };
  auto has_task = [&](int turn) { return task_number(turn) < schedule.blocks * schedule.matrices; };
  auto task_of = [&](int turn) {
    const Place place = place_of(task_number(turn), schedule.blocks, schedule.matrices, schedule.together);
    return Task{turn, place.matrix, (schedule.blocks - 1 - place.block) * BM};
  };
  auto tiles_of = [&](const Task& t) {
    const int b = t.bh / p.H;
    return Tiles(visible_keys(p, b, t.i0), visible_keys(p, b, min(t.i0 + BM, p.T) - 1));
  };
  if (threadIdx.x == 0) {
    for (int n = 0; n < 2; n++) mbarrier_init(q_full(n), 1), mbarrier_init(q_free(n), C::WARPS);
    for (int s = 0; s < STAGES; s++) {
      mbarrier_init(k_full(s), 1), mbarrier_init(v_full(s), 1), mbarrier_init(v_seen(s), C::SCANNERS);
      mbarrier_init(k_free(s), CONSUMERS), mbarrier_init(v_free(s), CONSUMERS);
    }
    mbarrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    setmaxnreg_dec<CONSUMERS == 2 ? 40 : 32>();
    const int warp = warp_number(), lane = threadIdx.x % 32;
    if (warp == 0) {  // ---- loads
      if (lane != 0) return;
      auto load = [&](uint32_t to, const CUtensorMap& map, uint32_t barrier, int b, int head, int row, int rows) {
        mbarrier_expect(barrier, rows * D * 2);
        for (int panel = 0; panel < PANELS; panel++)
          tma_load(to + panel * rows * 128, &map, barrier, panel * 64, row, head, b);
      };
      int n = 0;  // tiles so far
      for (int turn = 0; has_task(turn); turn++) {
        const Task t = task_of(turn);
        const Tiles tiles = tiles_of(t);
        const int b = t.bh / p.H, h = t.bh % p.H;
        mbarrier_wait(q_free(turn), (turn / 2 & 1) ^ 1);
        load(q_at + turn % 2 * C::Q_BYTES, maps.q, q_full(turn), b, h, t.i0, BM);
        for (int at = tiles.last; at >= tiles.first; at -= BN, n++) {
          const int stage = n % STAGES, parity = (n / STAGES & 1) ^ 1;
          mbarrier_wait(k_free(stage), parity);
          load(k_at + stage * C::K_BYTES, maps.k, k_full(stage), b, h / p.group, at, BN);
          mbarrier_wait(v_free(stage), parity);
          load(v_at + stage * C::K_BYTES, maps.v, v_full(stage), b, h / p.group, at, BN);
        }
      }
      return;
    }
    int n = 0;  // ---- a look for nan and inf in tiles with masked elements
    for (int turn = 0; has_task(turn); turn++) {
      const Tiles tiles = tiles_of(task_of(turn));
      for (int at = tiles.last; at >= tiles.first; at -= BN, n++) {
        const int stage = n % STAGES;
        mbarrier_wait(v_full(stage), n / STAGES & 1);
        if (tiles.is_edge(at)) {
          const bool found =
              holds_nonfinite<E, BN * D * 2, 32 * C::SCANNERS>(v_data + stage * C::K_BYTES, int(threadIdx.x) - 32);
          const bool any = __any_sync(kAllLanes, found);
          if (lane == 0) dirty[stage * C::SCANNERS + warp - 1] = any;
        }
        if (lane == 0) mbarrier_arrive(v_seen(stage));
      }
    }
    return;
  }

  // ---- 64 queries
  setmaxnreg_inc<CONSUMERS == 2 ? 232 : 160>();
  const int warp = warp_number() - 4, w = warp / 4, lane = threadIdx.x % 32, warp_row = warp * 16;
  const bool leader = threadIdx.x % 128 == 0;
  // What the warp's rows see; then the first and the last row of the warpgroup, and those of the block. All is read back from
  // there: the compiler takes what lies in shared memory for the same in all lanes, and what a loop over documents found not.
  Range* const seen = reinterpret_cast<Range*>(parts + warp * C::PART_BYTES);
  Task* const put_away = reinterpret_cast<Task*>(seen + C::RANGES);  // the main loop has no registers to keep it in
  int n = 0;                                                         // tiles so far
  for (int turn = 0; has_task(turn); turn = put_away->turn + 1) {
    {
      const Task t = task_of(turn);
      const int row = lane < 16 ? warp_row + lane : lane < 18 ? w * 64 + (lane - 16) * 63 : (lane - 18) * (BM - 1);
      __syncwarp();
      if (lane == 31) *put_away = t;
      if (lane < C::RANGES) seen[lane] = visible_keys(p, t.bh / p.H, lane < 16 ? t.i0 + row : min(t.i0 + row, p.T - 1));
      __syncwarp();
    }
    const uint32_t queries_at = q_at + turn % 2 * C::Q_BYTES;
    const Tiles tiles(seen[18], seen[19]);
    // of the tiles those before column `to`, and up to `from`, hold keys that a query of this warpgroup sees; past T it has none
    int at = tiles.last, from = tiles.first, to = from;
    if (put_away->i0 + w * 64 < p.T && seen[17].hi > seen[16].lo) from = seen[16].lo / BN * BN, to = seen[17].hi;
    float o[1][D / 8][4] = {}, s[1][BN / 8][4], l[1][2] = {}, m[1][2] = {{-INFINITY, -INFINITY}}, rescale[1][2];
    uint32_t weights[BN / 16][4];

    auto multiply_keys = [&](int stage) {  // s = q k^T
      const uint64_t q = smem_descriptor(queries_at + w * 64 * 128, 16, 1024);
      const uint64_t keys = smem_descriptor(k_at + stage * C::K_BYTES, 16, 1024);
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        const int at = k % 4 * 32, panel = k / 4;
        wgmma<E, 0, 0>(s[0], moved(q, panel * BM * 128 + at), moved(keys, panel * BN * 128 + at), k != 0);
      }
      wgmma_commit();
    };
    auto add_values = [&](int stage) {  // o += weights v
      const uint64_t values = smem_descriptor(v_at + stage * C::K_BYTES, BN * 128, 1024);
#pragma unroll
      for (int k = 0; k < BN / 16; k++) wgmma<E, 1>(o[0], weights[k], moved(values, k * 16 * 128), 1);
      wgmma_commit();
    };
    auto weigh = [&](int j0) {  // s -> weights
      if (tiles.is_edge(j0)) mask(s, seen, j0, -INFINITY);
      softmax(s, m, l, rescale, schedule.scale_log2);
      if constexpr (DROPOUT)
        each_pair_kept<BN / 8>(dropout, put_away->bh, put_away->i0 + warp_row + lane / 4, j0,
                               [&](int n, int half, bool low, bool high) {
                                 if (!low) s[0][n][2 * half] = 0.f;
                                 if (!high) s[0][n][2 * half + 1] = 0.f;
                               });
    };
    auto pack = [&] {
#pragma unroll
      for (int k = 0; k < BN / 16; k++) result_as_a<E>(weights[k], s[0][2 * k], s[0][2 * k + 1]);
    };
    bool nonfinite = false;  // values in tiles with masked elements
    auto wait_for_values = [&](bool edge) {
      const int stage = n % STAGES;
      mbarrier_wait(v_full(stage), n / STAGES & 1);
      if (!edge) return;
      mbarrier_wait(v_seen(stage), n / STAGES & 1);
      int found = 0;
#pragma unroll
      for (int k = 0; k < C::SCANNERS; k++) found |= dirty[stage * C::SCANNERS + k];
      if (!found) return;
      nonfinite = true;
      for (int panel = 0; panel < PANELS; panel++)
        remove_nonfinite<BN, 128 * CONSUMERS>(Tile<E, 64>{v_data + stage * C::K_BYTES + panel * BN * 128},
                                              int(threadIdx.x) - 128);
      fence_proxy_async();  // before wgmma reads what was written here
      named_barrier(1, 128 * CONSUMERS);
    };
    auto pass = [&](bool edge) {  // a tile that others of the block need; no product keeps the warps together here
      mbarrier_wait(k_full(n % STAGES), n / STAGES & 1);
      wait_for_values(edge);
      named_barrier(2 + w, 128);
      if (leader) mbarrier_arrive(k_free(n % STAGES)), mbarrier_arrive(v_free(n % STAGES));
      n++, at -= BN;
    };
    auto release_queries = [&] {  // of the last task: what was written there has been read
      if (turn == 0 || lane != 0) return;
      tma_wait_read<0>();
      mbarrier_arrive(q_free(turn - 1));
    };

    mbarrier_wait(q_full(turn), turn / 2 & 1);
    if (from >= to) release_queries();
    while (at >= max(to, from)) pass(tiles.is_edge(at));
    if (from < to) {
      mbarrier_wait(k_full(n % STAGES), n / STAGES & 1);
      wgmma_fence();
      multiply_keys(n % STAGES);
      release_queries();
      wgmma_wait<0>();
      if (leader) mbarrier_arrive(k_free(n % STAGES));
      weigh(at);
      pack();
      wait_for_values(tiles.is_edge(at));
      while (at > from) {
        const int before = n % STAGES;
        n++, at -= BN;
        mbarrier_wait(k_full(n % STAGES), n / STAGES & 1);
        wgmma_fence();
        multiply_keys(n % STAGES);
        add_values(before);
        wgmma_wait<1>();
        if (leader) mbarrier_arrive(k_free(n % STAGES));
        weigh(at);
        finish_before_wait(smem_u32(put_away + 1) + lane * 4, l[0][0] + l[0][1]);
        wgmma_wait<0>();
        if (leader) mbarrier_arrive(v_free(before));
        each_element<1, D / 8>([&](int, int n, int e) { o[0][n][e] *= rescale[0][e / 2]; });
        pack();
        wait_for_values(tiles.is_edge(at));
      }
      wgmma_fence();
      add_values(n % STAGES);
      wgmma_wait<0>();
      if (leader) mbarrier_arrive(v_free(n % STAGES));
      n++, at -= BN;
    }
    const Task done = *put_away;
    while (at >= seen[18].lo / BN * BN) pass(Tiles(seen[18], seen[19]).is_edge(at));

    // through this warp's own rows of q, which only its warpgroup has read
    float factor[1][2];
    finish_softmax(m, l, factor, p, DROPOUT ? dropout.kept : 1.f, done.bh, done.i0 + warp_row + lane / 4);
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      float part[1][8][4];
      each_element<1, 8>([&](int, int n, int e) { part[0][n][e] = o[0][panel * 8 + n][e]; });
      const Tile<E, 64> tile{smem + done.turn % 2 * C::Q_BYTES + panel * BM * 128};
      result_to_tile<E>(part, factor, tile, warp_row);
      if (nonfinite)
        spread_nonfinite<16>(tile, warp_row, seen, p, p.v, done.bh / p.H, done.bh % p.H / p.group, panel * 64);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {  // rows past T are left out
      for (int panel = 0; panel < PANELS; panel++)
        tma_store(&maps.y, q_at + done.turn % 2 * C::Q_BYTES + (panel * BM + warp_row) * 128, panel * 64,
                  done.i0 + warp_row, done.bh % p.H, done.bh / p.H);
      tma_commit();
    }
  }
  if (lane == 0) tma_wait_read<0>();
#else
  __trap();
#endif
}

}  // namespace
}  // namespace gptfast::cuda
