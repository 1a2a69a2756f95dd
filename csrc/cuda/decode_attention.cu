// Forward of causal_attention for few queries and many keys, as in cached generation: every head's keys are split among
// blocks, and a second kernel combines what they found (Flash-Decoding). With one query a head nothing is reused, so the
// bytes of k and v decide: no tensor cores, 16-byte loads, LANES lanes a key.
//
// The query heads that share a key head are rows of one problem: row r is query r / group of the group's head r % group.
// A block holds QUERIES rows. A group of LANES lanes walks over keys with a maximum, a sum and an output of
// its own per query; the groups of a block are combined through shared memory, in one order, and the splits by `combine`.
//
// Floor: k and v are read once a group of query heads: 2 B (H / group) S D values, here from memory; every QUERIES rows
// read them once more from L2.
#include "causal_attention_softmax.cuh"
#include "causal_attention_visible.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMostQueries = 16, kShortest = 64;  // keys of a split, at least

// What one split leaves for one query: m, l and D values of output (not yet divided by l).
DEV_INLINE float* partial_of(const AttentionParams& p, i64 query, int splits, int split) {
  return p.partial + (query * splits + split) * (p.D + 2);
}

template <class E, int LANES, int QUERIES>
__global__ void __launch_bounds__(kThreads) attend_split(const __grid_constant__ AttentionParams p, int splits) {
  constexpr int GROUPS = kThreads / LANES, ROW = LANES * 8 + 2;
  constexpr int AT_ONCE =
      sizeof(E) == 4 ? 2 : 4;  // keys, and as many values, that a lane asks for before it uses the first
  DYN_SMEM(smem);
  float* found = reinterpret_cast<float*>(smem);  // of each group: m, l, output
  const int parts = (p.T * p.group + QUERIES - 1) / QUERIES, key_heads = p.H / p.group;
  const int split = blockIdx.x % splits, part = int(blockIdx.x) / splits % parts;
  const int b = int(blockIdx.x) / (splits * parts) / key_heads, h = int(blockIdx.x) / (splits * parts) % key_heads;
  const int r0 = part * QUERIES;
  auto query = [&](int r) { return r / p.group; };
  auto query_head = [&](int r) { return h * p.group + r % p.group; };
  const int group = int(threadIdx.x) / LANES, column = int(threadIdx.x) % LANES * 8;
  const float scale_log2 = scale_log2_of(p);
  const auto mine = [&](int) { return column; };

  Range seen[QUERIES], any{p.S, 0};  // a missing query sees nothing
  float q[QUERIES][8], o[QUERIES][8] = {}, m[QUERIES], l[QUERIES];
#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    m[i] = -INFINITY, l[i] = 0.f, seen[i] = {0, 0};
    if (r0 + i < p.T * p.group) {
      seen[i] = visible_keys(p, b, query(r0 + i));
      Raw<E, 8> raw[1];
      load_chunks<E>(
          raw, p, [&](int) { return row_of<E>(p.q, b, query_head(r0 + i), query(r0 + i)); }, mine,
          [](int) { return true; });
      raw[0].values(q[i]);
      any.lo = min(any.lo, seen[i].lo), any.hi = max(any.hi, seen[i].hi);
    } else {
#pragma unroll
      for (int n = 0; n < 8; n++) q[i][n] = 0.f;
    }
  }
  const int keys = max(any.hi - any.lo, 0), each = (keys + splits - 1) / splits;
  const int begin = any.lo + split * each, end = min(begin + each, any.hi);
  // whole warps go on together, as they exchange sums; a group past the end sees no key
  for (int first = begin + group; first - group < end; first += AT_ONCE * GROUPS) {
    Raw<E, 8> both[2 * AT_ONCE];  // keys, then values
    load_chunks<E>(
        both, p, [&](int n) { return row_of<E>(n < AT_ONCE ? p.k : p.v, b, h, first + n % AT_ONCE * GROUPS); }, mine,
        [&](int n) { return first + n % AT_ONCE * GROUPS < end; });
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int j = first + u * GROUPS;
      float k[8], v[8];
      both[u].values(k), both[AT_ONCE + u].values(v);
#pragma unroll
      for (int i = 0; i < QUERIES; i++) {
        float s = 0.f;
#pragma unroll
        for (int n = 0; n < 8; n++) s = fmaf(q[i][n], k[n], s);
#pragma unroll
        for (int distance = LANES / 2; distance; distance /= 2) s += __shfl_xor_sync(kAllLanes, s, distance);
        if (j >= end || !seen[i].holds(j)) continue;
        if (p.softcap > 0.f) s = capped(p, s);
        const float top = fmaxf(m[i], s), shift = top == -INFINITY ? 0.f : top;
        const float rescale = fast_exp2((m[i] - shift) * scale_log2), weight = fast_exp2((s - shift) * scale_log2);
        m[i] = top, l[i] = fmaf(l[i], rescale, weight);
#pragma unroll
        for (int n = 0; n < 8; n++) o[i][n] = fmaf(o[i][n], rescale, weight * v[n]);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < QUERIES; i++) {
    float* own = found + group * ROW;
    __syncthreads();  // the query before has been combined
    if (column == 0) own[0] = m[i], own[1] = l[i];
#pragma unroll
    for (int n = 0; n < 8; n++) own[2 + column + n] = o[i][n];
    __syncthreads();
    if (r0 + i >= p.T * p.group) continue;
    float top = -INFINITY, sum = 0.f;
    for (int g = 0; g < GROUPS; g++) top = fmaxf(top, found[g * ROW]);
    const float shift = top == -INFINITY ? 0.f : top;
    for (int g = 0; g < GROUPS; g++) sum += found[g * ROW + 1] * fast_exp2((found[g * ROW] - shift) * scale_log2);
    float* to = partial_of(p, i64(b * p.H + query_head(r0 + i)) * p.T + query(r0 + i), splits, split);
    if (threadIdx.x == 0) to[0] = top, to[1] = sum;
    for (int d = threadIdx.x; d < p.D; d += kThreads) {
      float x = 0.f;
      for (int g = 0; g < GROUPS; g++)
        x = fmaf(found[g * ROW + 2 + d], fast_exp2((found[g * ROW] - shift) * scale_log2), x);
      to[2 + d] = x;
    }
  }
}

// One warp a query.
template <class E>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ AttentionParams p, int splits) {
  const i64 query = i64(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (query >= i64(p.B) * p.H * p.T) return;
  const int i = int(query % p.T), bh = int(query / p.T), lane = threadIdx.x % 32;
  const float scale_log2 = scale_log2_of(p);
  float top = -INFINITY, sum = 0.f;
  for (int s = 0; s < splits; s++) top = fmaxf(top, partial_of(p, query, splits, s)[0]);
  const float shift = top == -INFINITY ? 0.f : top;
  for (int s = 0; s < splits; s++) {
    const float* x = partial_of(p, query, splits, s);
    sum += x[1] * fast_exp2((x[0] - shift) * scale_log2);
  }
  const float factor = finish_query(p, bh, i, top, sum, 1.f, lane == 0);
  E* out = row_of<E>(p.y, bh / p.H, bh % p.H, i);
  for (int d = lane; d < p.D; d += 32) {
    float y = 0.f;
    for (int s = 0; s < splits; s++) {
      const float* x = partial_of(p, query, splits, s);
      y = fmaf(x[2 + d], fast_exp2((x[0] - shift) * scale_log2), y);
    }
    from_float(out[d], y * factor);
  }
}

template <class E, int LANES, int QUERIES>
cudaError_t launch(const AttentionParams& p, int splits, cudaStream_t stream) {
  const i64 parts = ceil_div(i64(p.T) * p.group, QUERIES), key_heads = i64(p.B) * p.H / p.group;
  auto attend = attend_split<E, LANES, QUERIES>;
  constexpr int smem = kThreads / LANES * (LANES * 8 + 2) * 4;
  LAUNCH(attend, dim3(unsigned(key_heads * parts * splits)), dim3(kThreads), smem, stream, p, splits);
  if (const cudaError_t error = cudaGetLastError()) return error;
  auto join = combine<E>;
  LAUNCH(join, dim3(unsigned(ceil_div(i64(p.B) * p.H * p.T, kWarps))), dim3(kThreads), 0, stream, p, splits);
  return cudaGetLastError();
}
template <class E, int LANES> cudaError_t launch_queries(const AttentionParams& p, int splits, cudaStream_t stream) {
  return p.T * p.group == 1 ? launch<E, LANES, 1>(p, splits, stream) : launch<E, LANES, 4>(p, splits, stream);
}

}  // namespace

// Enough blocks for two a multiprocessor of a large GPU; the same on every GPU, so that results are too. 0: not taken.
int decode_attention_splits(const AttentionParams& p) {
  if (p.T > kMostQueries || p.S < 2 * kShortest || p.dropout.threshold) return 0;
  const i64 rows = i64(p.T) * p.group, most = p.S / kShortest;
  const i64 blocks = i64(p.B) * p.H / p.group * ceil_div(rows, rows == 1 ? 1 : 4);
  if (!blocks) return 0;
  const i64 wanted = ceil_div(264, blocks);
  return int(wanted < most ? wanted : most);
}

cudaError_t decode_attention(const AttentionParams& p, cudaStream_t stream) {
  const int splits = decode_attention_splits(p);
  return with_dtype(p.dtype, [&](auto element) {
    using E = decltype(element);
    if (p.D <= 32) return launch_queries<E, 4>(p, splits, stream);
    if (p.D <= 64) return launch_queries<E, 8>(p, splits, stream);
    if (p.D <= 128) return launch_queries<E, 16>(p, splits, stream);
    return launch_queries<E, 32>(p, splits, stream);
  });
}

}  // namespace gptfast::cuda
