// Forward of causal_attention for few queries and many keys, as in cached generation: every head's keys are split among
// blocks, and the last of them to end combines what all found (Flash-Decoding). With one query a head nothing is reused, so
// the bytes of k and v decide: no tensor cores, 16-byte loads, LANES lanes a key.
//
// The query heads that share a key head are rows of one problem: row r is query r / group of the group's head r % group.
// A block holds QUERIES rows. A group of LANES lanes walks over keys with a maximum, a sum and an output of
// its own per query; the groups of a block are combined through shared memory, in one order, and the splits through global
// memory, in one order too, whichever block does it. The key of a new position is attended to from registers by the last
// split, which stores it.
//
// A step that appends starts while the kernel before it ends: with the length of its row and the first keys and values where
// these are ready. What it waits for is the query and the new position.
//
// Floor: k and v are read once a group of query heads: 2 B (H / group) S D values, here from memory; every QUERIES rows
// read them once more from L2.
#include "decode_attention.h"

#include "causal_attention_softmax.cuh"
#include "causal_attention_visible.cuh"
#include "overlap.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMostQueries = 16, kShortest = 64;  // keys of a split, at least
constexpr int kFourRows = 4, kMostSplits = 340;                                       // times rows: shared memory

constexpr int blocks_at_once(int queries) { return queries == 1 ? 4 : 2; }  // on a processor, by registers

// What one split leaves for one query: m, l and D values of output (not yet divided by l).
DEV_INLINE float* partial_of(const AttentionParams& p, i64 query, int splits, int split) {
  return p.partial + (query * splits + split) * (p.D + 2);
}

// Whether this block is the last of `count` to come here, which then sees what all of them have written. The counter is 0
// before the first and after the last.
DEV_INLINE bool comes_last(unsigned* counter, int count, unsigned* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *shared = atomicAdd(counter, 1u);
    if (*shared + 1 == unsigned(count)) *counter = 0;
  }
  __syncthreads();
  const bool last = *shared + 1 == unsigned(count);
  __threadfence();
  __syncthreads();  // the shared memory may be written again
  return last;
}

// The rows of a block: row r0 + i is a query of a query head; `index` is its place in (B, H, T). A block of one row has the only
// query of a head.
template <int QUERIES> struct BlockRows {
  int b, h, r0, T, group, H;
  DEV_INLINE int query(int i) const { return QUERIES == 1 ? 0 : (r0 + i) / group; }
  DEV_INLINE int head(int i) const { return QUERIES == 1 ? h : h * group + (r0 + i) % group; }
  DEV_INLINE bool holds(int i) const { return QUERIES == 1 || r0 + i < T * group; }
  DEV_INLINE i64 index(int i) const { return i64(b * H + head(i)) * T + query(i); }
};

// Adds up what the splits have left, in order, and stores the rows. `room`: 3 QUERIES splits floats.
template <class E, int QUERIES>
DEV_INLINE void combine(const AttentionParams& p, const BlockRows<QUERIES>& rows, int splits, float* room) {
  const float scale_log2 = scale_log2_of(p);
  const int n = QUERIES * splits;
  float *maxima = room, *sums = room + n, *weights = room + 2 * n;
  for (int e = threadIdx.x; e < n; e += kThreads) {
    const int row = QUERIES == 1 ? 0 : e / splits;
    const float* from = partial_of(p, rows.index(rows.holds(row) ? row : 0), splits, e - row * splits);
    maxima[e] = from[0], sums[e] = from[1];
  }
  __syncthreads();
#pragma unroll 1  // compiled once: it waits for memory, and unrolled is most of what ptxas has to do
  for (int i = 0; i < QUERIES; i++) {
    float top = -INFINITY, sum = 0.f;
    for (int s = 0; s < splits; s++) top = fmaxf(top, maxima[i * splits + s]);
    const float shift = top == -INFINITY ? 0.f : top;
    for (int s = threadIdx.x; s < splits; s += kThreads)
      weights[i * splits + s] = fast_exp2((maxima[i * splits + s] - shift) * scale_log2);
    __syncthreads();
    for (int s = 0; s < splits; s++) sum += sums[i * splits + s] * weights[i * splits + s];
    if (!rows.holds(i)) continue;
    const int head = rows.b * p.H + rows.head(i);
    const float factor = finish_query(p, head, rows.query(i), top, sum, 1.f, threadIdx.x == 0 && p.shift);
    E* out = row_of<E>(p.y, rows.b, rows.head(i), rows.query(i));
    for (int d = threadIdx.x; d < p.D; d += kThreads) {
      const float* from = partial_of(p, rows.index(i), splits, 0) + 2 + d;
      float y = 0.f;
#pragma unroll 8
      for (int s = 0; s < splits; s++) y = fmaf(from[i64(s) * (p.D + 2)], weights[i * splits + s], y);
      from_float(out[d], y * factor);
    }
  }
}

template <class E, int LANES, int QUERIES>
__global__ void __launch_bounds__(kThreads, blocks_at_once(QUERIES))
    attend_split(const __grid_constant__ AttentionParams p, const __grid_constant__ NewPosition next, int splits,
                 unsigned* counters) {
  constexpr int GROUPS = kThreads / LANES, ROW = LANES * 8 + 2;
  constexpr int AT_ONCE =
      sizeof(E) == 4 ? 2 : 4;  // keys, and as many values, that a lane asks for before it uses the first
  DYN_SMEM(smem);
  float* found = reinterpret_cast<float*>(smem);  // of each group: m, l, output
  if (!next.cache_ready) wait_for_earlier_kernels();
  const int parts = QUERIES == 1 ? 1 : (p.T * p.group + QUERIES - 1) / QUERIES;
  const int key_heads = QUERIES == 1 ? p.H : p.H / p.group;
  const int split = blockIdx.x % splits, part = int(blockIdx.x) / splits % parts;
  const int b = int(blockIdx.x) / (splits * parts) / key_heads, h = int(blockIdx.x) / (splits * parts) % key_heads;
  const BlockRows<QUERIES> rows{b, h, part * QUERIES, p.T, p.group, p.H};
  const int group = int(threadIdx.x) / LANES, column = int(threadIdx.x) % LANES * 8;
  const float scale_log2 = scale_log2_of(p);
  const auto mine = [&](int) { return column; };

  Range seen[QUERIES], any{p.S, 0};  // a missing query sees nothing
  float q[QUERIES][8], o[QUERIES][8] = {}, m[QUERIES], l[QUERIES];
#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    m[i] = -INFINITY, l[i] = 0.f, seen[i] = {0, 0};
    if (!rows.holds(i)) continue;
    seen[i] = visible_keys(p, b, rows.query(i));
    any.lo = min(any.lo, seen[i].lo), any.hi = max(any.hi, seen[i].hi);
  }
  // One key of each group; all lanes of a warp call.
  const auto attend = [&](const Raw<E, 8>& key, const Raw<E, 8>& value, auto visible) {
    float k[8], v[8];
    key.values(k), value.values(v);
#pragma unroll
    for (int i = 0; i < QUERIES; i++) {
      float s = 0.f;
#pragma unroll
      for (int n = 0; n < 8; n++) s = fmaf(q[i][n], k[n], s);
#pragma unroll
      for (int distance = LANES / 2; distance; distance /= 2) s += __shfl_xor_sync(kAllLanes, s, distance);
      if (!visible(i)) continue;
      if (p.softcap > 0.f) s = capped(p, s);
      const float top = fmaxf(m[i], s), shift = top == -INFINITY ? 0.f : top;
      const float rescale = fast_exp2((m[i] - shift) * scale_log2), weight = fast_exp2((s - shift) * scale_log2);
      m[i] = top, l[i] = fmaf(l[i], rescale, weight);
#pragma unroll
      for (int n = 0; n < 8; n++) o[i][n] = fmaf(o[i][n], rescale, weight * v[n]);
    }
  };
  const auto take_queries = [&] {
    wait_for_earlier_kernels();
    let_next_kernel_start();
    Raw<E, 8> raw[QUERIES];
    load_chunks<E>(
        raw, p, [&](int i) { return row_of<E>(p.q, b, rows.head(i), rows.query(i)); }, mine,
        [&](int i) { return rows.holds(i); });
#pragma unroll
    for (int i = 0; i < QUERIES; i++) raw[i].values(q[i]);
  };
  if (!kOverlaps) take_queries();  // elsewhere when the first keys are on their way
  const int keys = max(any.hi - any.lo, 0), each = (keys + splits - 1) / splits;
  const int begin = any.lo + split * each, end = min(begin + each, any.hi);
  // Whole warps go on together, as they exchange sums; a group past the end sees no key. A block without keys may turn once.
  for (int first = begin + group; first - group < end || (kOverlaps && first - group == begin);
       first += AT_ONCE * GROUPS) {
    Raw<E, 8> both[2 * AT_ONCE];  // keys, then values
    load_chunks<E>(
        both, p, [&](int n) { return row_of<E>(n < AT_ONCE ? p.k : p.v, b, h, first + n % AT_ONCE * GROUPS); }, mine,
        [&](int n) { return first + n % AT_ONCE * GROUPS < end; });
    if (kOverlaps && first - group == begin) take_queries();
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int j = first + u * GROUPS;
      attend(both[u], both[AT_ONCE + u], [&](int i) { return j < end && seen[i].holds(j); });
    }
  }
  if (next.k.data && split == splits - 1) {
    const i64 at = static_cast<const i64*>(p.seq_lens.data)[b];
    const bool stored = group == 0 && at >= 0 && at < p.S;
    Raw<E, 8> both[2];
    load_chunks<E>(
        both, p, [&](int n) { return row_of<E>(n ? next.v : next.k, b, h, 0); }, mine, [&](int) { return stored; });
    attend(both[0], both[1], [&](int) { return stored; });
    for (int n = 0; n < 2 && stored && part == 0; n++) {
      E* to = row_of<E>(n ? next.values : next.keys, b, h, int(at)) + column;
      E values[8];
      memcpy(values, both[n].words, sizeof values);
      if (p.whole_chunks && p.D % 8 == 0 && column < p.D) both[n].store(to);
      else
        for (int d = 0; d < 8 && column + d < p.D; d++) to[d] = values[d];
    }
  }

  float* own = found + group * ROW;
#pragma unroll 1  // compiled once, as in combine()
  for (int i = 0; i < QUERIES; i++) {
    __syncthreads();  // the query before has been combined
#pragma unroll
    for (int query = 0; query < QUERIES; query++) {  // registers have no index
      if (query != i) continue;
      if (column == 0) own[0] = m[query], own[1] = l[query];
#pragma unroll
      for (int n = 0; n < 8; n++) own[2 + column + n] = o[query][n];
    }
    __syncthreads();
    if (!rows.holds(i)) continue;
    float top = -INFINITY, sum = 0.f, weights[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; g++) top = fmaxf(top, found[g * ROW]);
    const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      weights[g] = fast_exp2((found[g * ROW] - shift) * scale_log2);
      sum += found[g * ROW + 1] * weights[g];
    }
    float* to = splits == 1 ? nullptr : partial_of(p, rows.index(i), splits, split);
    E* out = row_of<E>(p.y, b, rows.head(i), rows.query(i));
    float factor = 1.f;
    if (to && threadIdx.x == 0) to[0] = top, to[1] = sum;
    if (!to)
      factor = finish_query(p, b * p.H + rows.head(i), rows.query(i), top, sum, 1.f, threadIdx.x == 0 && p.shift);
    for (int d = threadIdx.x; d < p.D; d += kThreads) {
      float x = 0.f;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) x = fmaf(found[g * ROW + 2 + d], weights[g], x);
      if (to) to[2 + d] = x;
      else from_float(out[d], x * factor);
    }
  }
  if (splits == 1) return;
  if (comes_last(counters + blockIdx.x / splits, splits, reinterpret_cast<unsigned*>(found)))
    combine<E, QUERIES>(p, rows, splits, found);
}

template <class E, int LANES, int QUERIES>
cudaError_t launch(const AttentionParams& p, const NewPosition& next, int splits, unsigned* counters,
                   cudaStream_t stream) {
  const i64 parts = ceil_div(i64(p.T) * p.group, QUERIES), key_heads = i64(p.B) * p.H / p.group;
  constexpr auto attend = attend_split<E, LANES, QUERIES>;
  constexpr int smem = kThreads / LANES * (LANES * 8 + 2) * 4;
  static_assert(smem >= 3 * kMostSplits * 4);
  const dim3 grid(unsigned(key_heads * parts * splits));
  if (next.k.data) return launch_early<attend>(grid, dim3(kThreads), smem, stream, p, next, splits, counters);
  LAUNCH(attend, grid, dim3(kThreads), smem, stream, p, next, splits, counters);  // its counters have just been cleared
  return cudaGetLastError();
}

int rows_of_a_block(const AttentionParams& p) { return p.T * p.group == 1 ? 1 : kFourRows; }

// Blocks of one split. All blocks run in waves, each as long as its keys and what a block does beside them, in keys: the number
// of splits, the same on every GPU so that results are too, that makes their sum the least on a large one.
int splits_of(const AttentionParams& p) {
  constexpr i64 beside = 64, processors = 132;
  const int rows = rows_of_a_block(p);
  const i64 blocks = split_counters(p), at_once = processors * blocks_at_once(rows);
  i64 best = 1, least = 0;
  for (i64 splits = 1; splits == 1 || (splits <= p.S / kShortest && splits * rows <= kMostSplits); splits++) {
    const i64 time = ceil_div(blocks * splits, at_once) * (ceil_div(p.S, splits) + beside);
    if (splits == 1 || time < least) best = splits, least = time;
    if (blocks * splits > 32 * at_once) break;  // the ends of waves do not matter any more
  }
  return int(best);
}

}  // namespace

i64 split_counters(const AttentionParams& p) {
  return i64(p.B) * p.H / p.group * ceil_div(i64(p.T) * p.group, rows_of_a_block(p));
}
i64 split_partial(const AttentionParams& p, int splits) {
  return splits > 1 ? i64(p.B) * p.H * p.T * splits * (p.D + 2) : 0;
}
int append_splits(const AttentionParams& p) { return splits_of(p); }
int decode_attention_splits(const AttentionParams& p) {
  const bool few = p.B && p.H && p.T && p.T <= kMostQueries;
  return few && p.S >= 2 * kShortest && !p.dropout.threshold ? splits_of(p) : 0;
}

cudaError_t decode_attention(const AttentionParams& p, const NewPosition& next, int splits, unsigned* counters,
                             cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto element) {
    const auto queries = [&](auto lanes) {
      constexpr int LANES = decltype(lanes)::value;
      using E = decltype(element);
      if (rows_of_a_block(p) == 1) return launch<E, LANES, 1>(p, next, splits, counters, stream);
      return launch<E, LANES, kFourRows>(p, next, splits, counters, stream);
    };
    if (p.D <= 32) return queries(Width<4>{});
    if (p.D <= 64) return queries(Width<8>{});
    if (p.D <= 128) return queries(Width<16>{});
    return queries(Width<32>{});
  });
}

}  // namespace gptfast::cuda
