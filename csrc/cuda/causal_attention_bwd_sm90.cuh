// The kernel of backward on Hopper (causal_attention_bwd_shape_sm90.cuh): dq, or dk and dv.
#pragma once
#include "causal_attention_bwd_shape_sm90.cuh"
#include "causal_attention_delta.cuh"
#include "causal_attention_dropout_sm90.cuh"

namespace gptfast::cuda {
namespace {

template <class C, bool DROPOUT>
__global__ void HOPPER_BOUNDS(C::THREADS)
    attention_backward_sm90(const __grid_constant__ AttentionParams p, const __grid_constant__ BackwardMaps maps,
                            const __grid_constant__ HopperDropout dropout) {
#if defined(GPTFAST_HOPPER)
  using E = typename C::E;
  constexpr bool KEYS = C::KEYS, IN_REGISTERS = C::IN_REGISTERS, GROUPS = C::GROUPS, AHEAD = C::AHEAD;
  constexpr bool TIGHT = KEYS && DROPOUT && C::D == 128;       // no register is left, also not for a branch
  constexpr bool REORDERED = IN_REGISTERS && KEYS && DROPOUT;  // row r of the block is key key_of_row(r)
  constexpr int D = C::D, BM = C::BM, BN = C::BN, STAGES = C::STAGES, PANELS = D / 64, NT = BN / 8;
  DYN_SMEM(smem);
  char* const tiles_data = smem + 2 * C::KEPT_BYTES;  // of each stage: b0, then b1
  char* const after_tiles = tiles_data + 2 * STAGES * C::TILE_BYTES;
  const uint32_t kept_at = smem_u32(smem), tiles_at = smem_u32(tiles_data), kept_full = smem_u32(after_tiles);
  auto full = [&](int stage) { return kept_full + 8 + stage * 8; };
  auto used = [&](int stage) { return kept_full + 8 + (STAGES + stage) * 8; };
  Range* seen = reinterpret_cast<Range*>(after_tiles + C::BARRIERS * 8);
  float* statistics = reinterpret_cast<float*>(seen + BM);  // of each stage: level, delta and shift of its queries
  int *far = reinterpret_cast<int*>(statistics + 3 * STAGES * BN), *flags = far + STAGES;  // any shift not 0?
  const int rows = KEYS ? p.S : p.T, blocks = (rows + BM - 1) / BM, bh = blockIdx.x / blocks;
  const int heads = KEYS ? p.H / p.group : p.H, b = bh / heads, h = bh % heads, block = int(blockIdx.x) % blocks;
  const int members = GROUPS ? p.group : 1;                   // query heads whose tiles are met, one after another
  const int row0 = (KEYS ? block : blocks - 1 - block) * BM;  // those that see, or are seen by, the most first
  auto seen_by = [&](int row) { return KEYS ? visible_queries(p, b, row) : visible_keys(p, b, row); };
  auto tiles_of = [](Range first, Range last) {
    const int begin = first.lo / BN * BN;
    return Range{begin, last.hi > begin ? (last.hi - begin + BN - 1) / BN : 0};
  };
  auto load = [&](uint32_t to, const CUtensorMap& map, uint32_t barrier, int head, int row, int count) {
    for (int panel = 0; panel < PANELS; panel++)
      tma_load(to + panel * count * 128, &map, barrier, panel * 64, row, head, b);
  };
  auto load_tiles = [&](int n, int begin, int tiles) {
    const int stage = n % STAGES, head = KEYS ? h * members + n / tiles : h / p.group, row = begin + n % tiles * BN;
    const uint32_t to = tiles_at + stage * 2 * C::TILE_BYTES;
    mbarrier_expect(full(stage), 2 * C::TILE_BYTES);
    load(to, maps.b0, full(stage), head, row, BN);
    load(to + C::TILE_BYTES, maps.b1, full(stage), head, row, BN);
  };
  if (threadIdx.x == 0) {
    mbarrier_init(kept_full, 1);
    for (int s = 0; s < STAGES; s++) mbarrier_init(full(s), KEYS ? 33 : 1), mbarrier_init(used(s), C::WARPS);
    mbarrier_init_fence();
    const Range own = tiles_of(seen_by(row0), seen_by(min(row0 + BM, rows) - 1));
    if (own.hi) {  // under way while the others look at the masks
      mbarrier_expect(kept_full, 2 * C::KEPT_BYTES);
      load(kept_at, maps.a0, kept_full, h, row0, BM);
      load(kept_at + C::KEPT_BYTES, maps.a1, kept_full, h, row0, BM);
    }
    for (int n = 0; n < min(members * own.hi, C::AT_FIRST); n++) load_tiles(n, own.lo, own.hi);
  }
  auto place_of_row = [](int r) { return REORDERED ? row_of_key(r) : r; };
  for (int r = threadIdx.x; r < BM; r += C::THREADS) seen[place_of_row(r)] = seen_by(row0 + r);
  __syncthreads();
  const Range first = seen[0], last = seen[place_of_row(min(BM, rows - row0) - 1)];
  const int begin = tiles_of(first, last).lo, tiles = tiles_of(first, last).hi;
  if (threadIdx.x < 128) {  // ---- loads
    setmaxnreg_dec<40>();
    const int lane = threadIdx.x;
    if (lane == 0)
      for (int n = C::AT_FIRST; n < members * tiles; n++) {
        mbarrier_wait(used(n % STAGES), (n / STAGES & 1) ^ 1);
        load_tiles(n, begin, tiles);
      }
    if (KEYS && lane / 32 == 1)
      for (int i = 0; i < members * tiles; i++) {
        const int stage = i % STAGES, row = begin + i % tiles * BN;
        const i64 matrix = b * p.H + h * members + i / tiles;
        mbarrier_wait(used(stage), (i / STAGES & 1) ^ 1);
        bool any = false;
        for (int n = lane % 32; n < 3 * BN; n += 32) {
          const int query = row + n % BN;
          const float* from = n < BN ? p.level : n < 2 * BN ? p.delta : p.shift;
          const float x = query < p.T ? from[matrix * p.T + query] : 0.f;
          statistics[stage * 3 * BN + n] = x;
          any |= n >= 2 * BN && x != 0.f;
        }
        any = __any_sync(kAllLanes, any);
        if (lane % 32 == 0) far[stage] = any;
        mbarrier_arrive(full(stage));
      }
    return;
  }
  // ---- 64 rows
  setmaxnreg_inc<232>();
  const int w = (TIGHT ? int(threadIdx.x) / 32 : warp_number()) / 4 - 1;
  const int warp = int(threadIdx.x) / 32 - 4, lane = threadIdx.x % 32;
  const int warp_row = warp * 16, row = row0 + warp_row + lane / 4;
  auto result_row = [&](int r) { return REORDERED ? key_of_row(warp_row + r) : warp_row + r; };
  const Range group_first = seen[w * 64], group_last = seen[w * 64 + 63];
  const float scale_log2 = p.scale * kLog2e, kept = TIGHT ? dropout_scale(p.dropout) : dropout.kept;
  float sum0[1][D / 8][4] = {}, sum1[1][D / 8][4] = {};  // dq or dk; dv
  float level[2] = {}, delta[2] = {}, shift[2] = {};     // of this lane's queries, where rows are queries
  if constexpr (!KEYS) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const bool inside = row + 8 * n < p.T;
      const i64 query = i64(bh) * p.T + row + 8 * n;
      level[n] = inside ? p.level[query] : 0.f;
      shift[n] = inside ? p.shift[query] : 0.f;
    }
    query_deltas<E, D>(delta, p, b, h, row);
  }

  uint32_t own[2][IN_REGISTERS ? D / 16 : 1][4];                    // this warp's rows of a0 and a1
  auto multiply = [&](float (&x)[1][NT][4], int side, int stage) {  // a b^T
    const uint64_t a = smem_descriptor(kept_at + side * C::KEPT_BYTES + w * 64 * 128, 16, 1024);
    const uint64_t other = smem_descriptor(tiles_at + (stage * 2 + side) * C::TILE_BYTES, 16, 1024);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const int at = k % 4 * 32, panel = k / 4;
      const uint64_t b = moved(other, panel * BN * 128 + at);
      if constexpr (IN_REGISTERS) wgmma<E, 0>(x[0], own[side][k], b, k != 0);
      else wgmma<E, 0, 0>(x[0], moved(a, panel * BM * 128 + at), b, k != 0);
    }
  };
  auto add_weighted_rows = [&](float (&sum)[1][D / 8][4], const uint32_t (&weights)[BN / 16][4], int side, int stage) {
    const uint64_t other = smem_descriptor(tiles_at + (stage * 2 + side) * C::TILE_BYTES, BN * 128, 1024);
#pragma unroll
    for (int k = 0; k < BN / 16; k++) wgmma<E, 1>(sum[0], weights[k], moved(other, k * 16 * 128), 1);
  };
  auto pack = [&](uint32_t (&weights)[BN / 16][4], const float (&x)[1][NT][4]) {
#pragma unroll
    for (int k = 0; k < BN / 16; k++) result_as_a<E>(weights[k], x[0][2 * k], x[0][2 * k + 1]);
  };
  using Decisions = BackwardDecisions<KEYS, NT>;
  auto decisions = [&](int matrix, int at) {
    Decisions kept;
    if constexpr (REORDERED) kept.words[0] = decisions_of_keys(dropout, matrix, row0, warp_row, at);
    else if constexpr (KEYS) kept.words[0] = decisions_in_order<NT>(p.dropout, matrix, row0 + warp_row, at);
    else pair_words<NT>(kept.words, dropout, matrix, row, at);
    return kept;
  };
  // s -> P (after dropout where rows are keys), dp -> dS
  auto slopes = [&](float (&s)[1][NT][4], float (&dp)[1][NT][4], const Decisions& decided, int stage) {
    const float* columns = statistics + stage * 3 * BN + lane % 4 * 2;
    auto level_of = [&](int n, int e) { return KEYS ? columns[n * 8 + e % 2] : level[e / 2]; };
    auto delta_of = [&](int n, int e) { return KEYS ? columns[BN + n * 8 + e % 2] : delta[e / 2]; };
    auto shift_of = [&](int n, int e) { return KEYS ? columns[2 * BN + n * 8 + e % 2] : shift[e / 2]; };
    if (!TIGHT && (KEYS ? far[stage] : shift[0] != 0.f || shift[1] != 0.f))
      each_element<1, NT>([&](int, int n, int e) { s[0][n][e] -= shift_of(n, e); });
    each_element<1, NT>([&](int, int n, int e) {
      const float score = TIGHT ? s[0][n][e] - shift_of(n, e) : s[0][n][e];
      s[0][n][e] = fast_exp2(fmaf(score, scale_log2, -level_of(n, e)));
    });
    auto slope = [&](int n, int e, bool keep) {
      const float d = DROPOUT ? fmaf(dp[0][n][e], keep ? kept : 0.f, -delta_of(n, e)) : dp[0][n][e] - delta_of(n, e);
      dp[0][n][e] = s[0][n][e] * d;
      if (KEYS && !keep) s[0][n][e] = 0.f;
    };
    if constexpr (DROPOUT && !KEYS) {
#pragma unroll
      for (int n = 0; n < 2 * NT; n++) {
        bool low, high;
        halves_at_least(decided.words[n], dropout.least, low, high);
        slope(n % NT, n / NT * 2, low), slope(n % NT, n / NT * 2 + 1, high);
      }
    } else {
      each_element<1, NT>([&](int, int n, int e) {
        slope(n, e, !DROPOUT || (decided.words[0] >> (REORDERED ? bit_of_key(n, e) : 4 * n + e) & 1));
      });
    }
  };
  bool nonfinite = false;        // keys in tiles with masked elements
  int edges = 0;                 // of them so far: flags alternate, as a warp may be one tile ahead of another
  auto clean = [&](int stage) {  // nan and inf in masked keys, once all scores are formed
    named_barrier(1, 128 * C::CONSUMERS);
    bool found = false;
    for (int panel = 0; panel < PANELS; panel++) {
      const Tile<E, 64> k{tiles_data + stage * 2 * C::TILE_BYTES + panel * BN * 128};
      found |= remove_nonfinite<BN, 128 * C::CONSUMERS>(k, int(threadIdx.x) - 128);
    }
    if (found) fence_proxy_async();  // before wgmma reads what was written here
    nonfinite |=
        any_found<C::WARPS>(found, warp, flags + edges++ % 2 * C::WARPS, [] { named_barrier(1, 128 * C::CONSUMERS); });
  };
  float s[1][NT][4], dp[1][NT][4];
  uint32_t weights[BN / 16][4], kept_weights[KEYS ? BN / 16 : 1][4];
  auto add_sums = [&](int stage) {
    if constexpr (KEYS) add_weighted_rows(sum1, kept_weights, 1, stage);
    add_weighted_rows(sum0, weights, 0, stage);
    wgmma_commit();
  };
  auto is_edge = [&](int at) { return at < last.lo || at + BN > first.hi; };
  auto weigh = [&](int stage, int at, const Decisions& decided) {
    slopes(s, dp, decided, stage);
    if (!is_edge(at)) return;
    mask(dp, seen + warp_row, at, 0.f);
    if constexpr (KEYS) mask(s, seen + warp_row, at, 0.f);
    else wgmma_wait<0>(), clean(stage);
  };
  auto pack_both = [&] {
    if constexpr (KEYS) pack(kept_weights, s);
    pack(weights, dp);
  };
  auto release = [&](int stage) {
    if (lane == 0) mbarrier_arrive(used(stage));
  };
  auto pass = [&](int n, int at) {  // a tile that the other warpgroup needs
    mbarrier_wait(full(n % STAGES), n / STAGES & 1);
    if (!KEYS && is_edge(at)) clean(n % STAGES);
    release(n % STAGES);
  };
  // of the tiles those from `from` on, before `to`, meet rows of this warpgroup
  const int from = min(tiles, max(group_first.lo - begin, 0) / BN);
  const int to = max(from, min(tiles, (group_last.hi - begin + BN - 1) / BN));
  const uint32_t scratch = smem_u32(flags + 2 * C::WARPS) + (threadIdx.x - 128) * 4;
  if (tiles) mbarrier_wait(kept_full, 0);
  if constexpr (IN_REGISTERS)
    if (tiles)
#pragma unroll
      for (int n = 0; n < 2 * (D / 16); n++)
        ldmatrix_x4(own[n % 2][n / 2], smem_u32(Tile<E, 64>{smem + n % 2 * C::KEPT_BYTES}.chunk(
                                           result_row(lane % 16), n / 2 * 2 + lane / 16)));
  if constexpr (REORDERED) named_barrier(2 + w, 128);  // before another warp's results are written where these lay
  for (int member = 0; member < members; member++) {
    const int matrix = KEYS ? bh * members + member : bh, n0 = GROUPS ? member * tiles : 0;
    for (int i = 0; i < from; i++) pass(n0 + i, begin + i * BN);
    auto stage_of = [&](int i) { return (n0 + i) % STAGES; };
    auto scores_of = [&](int i) {
      mbarrier_wait(full(stage_of(i)), (n0 + i) / STAGES & 1);
      wgmma_fence();
      multiply(s, 0, stage_of(i));
      multiply(dp, 1, stage_of(i));
      wgmma_commit();
    };
    auto decisions_of = [&](int i) {
      if constexpr (DROPOUT) return decisions(matrix, begin + i * BN);
      else return Decisions{};
    };
    auto weights_of = [&](int i) {
      scores_of(i);
      const Decisions decided = decisions_of(i);
      wgmma_wait<0>();
      weigh(stage_of(i), begin + i * BN, decided);
      pack_both();
    };
    auto finish_sums = [&](int i) {
      wgmma_fence();
      add_sums(stage_of(i));
      wgmma_wait<0>();
      release(stage_of(i));
    };
    if constexpr (AHEAD) {
      if (from < to) weights_of(from);
      for (int i = from + 1; i < to; i++) {
        scores_of(i);
        add_sums(stage_of(i - 1));
        const Decisions decided = decisions_of(i);
        wgmma_wait<1>();
        weigh(stage_of(i), begin + i * BN, decided);
        finish_before_wait(scratch, dp[0][0][0] + dp[0][NT - 1][3]);
        wgmma_wait<0>();
        release(stage_of(i - 1));
        pack_both();
      }
      if (from < to) finish_sums(to - 1);
    } else {
      for (int i = from; i < to; i++) weights_of(i), finish_sums(i);
    }
    for (int i = to; i < tiles; i++) pass(n0 + i, begin + i * BN);
  }
  // through this warp's own rows of what was kept, which only its warpgroup has read
  auto finish = [&](const float (&sum)[1][D / 8][4], float by, int side, const MutHeads& y) {
    const float factor[1][2] = {{by, by}};
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      float part[1][8][4];
      each_element<1, 8>([&](int, int n, int e) { part[0][n][e] = sum[0][panel * 8 + n][e]; });
      const Tile<E, 64> tile{smem + side * C::KEPT_BYTES + panel * BM * 128};
      result_to_tile<E>(part, factor, tile, warp_row);
      if (nonfinite) spread_nonfinite<16>(tile, warp_row, seen + warp_row, p, p.k, b, h / p.group, panel * 64);
      for (int c = lane; c < 16 * 8; c += 32) {
        const int at = row0 + result_row(c / 8), column = panel * 64 + c % 8 * 8;
        if (at < rows && column < p.D)
          *reinterpret_cast<uint4*>(row_of<E>(y, b, h, at) + column) =
              *reinterpret_cast<const uint4*>(tile.chunk(warp_row + c / 8, c % 8));
      }
    }
  };
  if constexpr (KEYS) finish(sum0, p.scale, 0, p.dk), finish(sum1, DROPOUT ? kept : 1.f, 1, p.dv);
  else finish(sum0, p.scale, 0, p.dq);
#else
  __trap();
#endif
}

}  // namespace
}  // namespace gptfast::cuda
