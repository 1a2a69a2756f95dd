// sample where rows are fewer than processors: a row is cut into parts, a block each, and a second kernel has a block a row.
//
// Without a cut a block draws from its part: the best score of all is that of the row. With top-k it lists the ranks from one on
// that at least k of its tokens reach, or all of them; the k best of the row are among those listed, and the second kernel cuts and
// draws as one block does. Ranks, masses and scores are the same numbers, so the token is the same. What neither serves (top-p
// alone, a large k) the second kernel does by itself.
#include "sample_parts.h"

#include "sample_draw.cuh"

namespace gptfast::cuda {
namespace {

using namespace sampling;

constexpr i64 kProcessors = 132, kMostParts = 8, kLeastTokens = 8192;
constexpr i64 kListed = 1024;  // ranks of a part, at most

// What a block leaves of its part: the best rank (kNan, 0), the least one listed, the number of finite logits and of listed
// ranks, and the best score.
struct Part {
  u64 best, lowest, finite, listed;
  Scored drawn;
};
struct Cut {
  i64 parts, tokens;  // of a row, and of a part: a multiple of 64
  explicit Cut(const SampleParams& p) {
    const i64 most = p.R && p.V >= kLeastTokens ? kProcessors / p.R : 1;
    tokens = ceil_div(p.V, 64 * (most < 1 ? 1 : most < kMostParts ? most : kMostParts)) * 64;
    parts = tokens ? ceil_div(p.V, tokens) : 1;
  }
};
struct Room {
  Part* parts;
  u64* ranks;
  Room(void* room, i64 parts) : parts(static_cast<Part*>(room)), ranks(reinterpret_cast<u64*>(this->parts + parts)) {}
};

__host__ __device__ inline bool without_cut(const SampleOptions& o, i64 V) {
  return o.top_p == 1 && (!o.top_k || o.top_k >= V);
}
__host__ __device__ inline bool few_kept(const SampleOptions& o) { return o.top_k > 0 && o.top_k <= kListed / 2; }
__host__ __device__ inline bool in_parts(const SampleOptions& o, i64 V) { return without_cut(o, V) || few_kept(o); }

template <class T>
__global__ void __launch_bounds__(kThreads) sample_part_kernel(const SampleParams p, Cut cut, Room room) {
  DYN_SMEM(smem);
  const Shared s(smem);
  const i64 r = blockIdx.x / cut.parts, first = blockIdx.x % cut.parts * cut.tokens;
  const SampleOptions o = p.each ? p.each[r] : p.all;
  if (!valid(o) || !in_parts(o, p.V)) return;
  const T* x = static_cast<const T*>(p.logits.data) + r * p.logits.stride + first;
  const Row<T> row{reinterpret_cast<T*>(s.row), min(cut.tokens, p.V - first), true, first};
  const Seen seen = read_row(x, row.V, reinterpret_cast<T*>(s.row), s, first);
  Part part{seen.best, kAboveMinusInf, seen.finite, 0, {-INFINITY, 0xffffffffu}};
  const float temperature = float(o.temperature);
  if (seen.best != kNan && seen.best >= kAboveMinusInf && !(temperature < 0x1p-126f)) {
    if (without_cut(o, p.V)) {  // a part whose logits are that large wins, or loses, by them
      if (!greedy(logit_of(seen.best), temperature))
        part.drawn = draw(Noise(p, o, r), row, units_of(temperature), part.lowest, seen.best, s);
    } else {
      if (i64(seen.finite) > kListed) {
        const bool many = seen.least > part.lowest && o.top_k <= i64(blockDim.x);
        part.lowest = select(row, many ? seen.least : part.lowest, seen.best, double(o.top_k), One{}, s, kListed);
      }
      if (threadIdx.x == 0) *s.listed = 0;
      __syncthreads();
      u64* list = room.ranks + blockIdx.x * kListed;
      for_ranks(row, part.lowest, [&](u64 rank) { list[atomicAdd(s.listed, 1u)] = rank; });
      __syncthreads();
      part.listed = *s.listed;
    }
  }
  if (threadIdx.x == 0) room.parts[blockIdx.x] = part;
}

// The token of a row of which the parts list the best ranks; `floor`: at least k tokens reach it, or it is the least of all.
DEV_INLINE i64 draw_listed(const SampleParams& p, const SampleOptions& o, i64 r, const Part* parts, const u64* ranks,
                           i64 count, const Part& all, u64 floor, const Shared& s) {
  u64* list = reinterpret_cast<u64*>(s.row);
  if (threadIdx.x == 0) *s.listed = 0;
  __syncthreads();
  for (i64 n = 0; n < count; n++)
    for (i64 e = threadIdx.x; e < i64(parts[n].listed); e += blockDim.x)
      if (ranks[n * kListed + e] >= floor) list[atomicAdd(s.listed, 1u)] = ranks[n * kListed + e];
  __syncthreads();
  const List row{list, i64(*s.listed)};
  __syncthreads();  // select counts there too
  const Noise noise(p, o, r);
  u64 lowest = kAboveMinusInf;
  if (o.top_k < i64(all.finite)) lowest = select(row, floor, all.best, double(o.top_k), One{}, s);
  if (o.top_p < 1) lowest = nucleus(row, p.V, o, units_of(noise.temperature), all.best, lowest, s);
  Scored mine{-INFINITY, 0xffffffffu};
  for_ranks(row, lowest, [&](u64 rank) {
    const i64 t = token_of(rank);
    const float v = sampling_uniform(word_of(noise.words_of(t), int(t & 3)));
    mine = Better{}(mine, noise.scored(logit_of(rank), v, t));
  });
  return block_reduce(mine, Better{}, Scored{-INFINITY, 0xffffffffu}, s.scratch).token;
}

template <class T>
DEV_INLINE i64 joined(const SampleParams& p, i64 r, i64 count, const Room& room, bool keep, const Shared& s) {
  const SampleOptions o = p.each ? p.each[r] : p.all;
  if (!valid(o)) return -3;
  if (!in_parts(o, p.V)) return sample_row<T>(p, r, keep, s);
  const Part* parts = room.parts + r * count;
  Part all{0, 0, 0, 0, {-INFINITY, 0xffffffffu}};
  u64 floor = kAboveMinusInf;
  for (i64 n = 0; n < count; n++) {
    const Part part = parts[n];
    all.best = part.best > all.best ? part.best : all.best, all.finite += part.finite;
    all.drawn = Better{}(all.drawn, part.drawn);
    if (i64(part.finite) >= o.top_k && part.lowest > floor) floor = part.lowest;
  }
  if (all.best == kNan) return -1;
  if (all.best < kAboveMinusInf) return -2;
  if (greedy(logit_of(all.best), float(o.temperature))) return token_of(all.best);
  if (without_cut(o, p.V)) return all.drawn.token;
  return draw_listed(p, o, r, parts, room.ranks + r * count * kListed, count, all, floor, s);
}

template <class T>
__global__ void __launch_bounds__(kThreads) sample_join_kernel(const SampleParams p, i64 parts, Room room, bool keep) {
  DYN_SMEM(smem);
  const i64 token = joined<T>(p, blockIdx.x, parts, room, keep, Shared(smem));
  if (threadIdx.x == 0) p.out[blockIdx.x] = token;
}

}  // namespace

i64 sample_parts_room(const SampleParams& p) {
  const i64 parts = Cut(p).parts;
  return parts > 1 && (p.each || in_parts(p.all, p.V)) ? p.R * parts * i64(sizeof(Part) + kListed * sizeof(u64)) : 0;
}

cudaError_t sample_parts(const SampleParams& p, void* memory, cudaStream_t stream) {
  const Cut cut(p);
  int most = 0;
  if (const cudaError_t error = shared_memory(&most)) return error;
  return with_dtype(p.logits.dtype, [&](auto t) {
    using T = decltype(t);
    const Room room(memory, p.R * cut.parts);
    const i64 accesses =
        cut.tokens * i64(sizeof(T)) / 16 - 1;  // each thread has one, so that the least of their best is one
    const int threads = accesses < kThreads ? int(accesses / 32 * 32) : kThreads;
    const size_t part = Shared::bytes(threads, size_t(cut.tokens) * sizeof(T));
    const size_t lists = size_t(cut.parts * kListed) * sizeof(u64), row = size_t(p.V + 3) / 4 * 4 * sizeof(T);
    const bool keep = Shared::bytes(kThreads, row) <= size_t(most);
    const size_t join = Shared::bytes(kThreads, keep && row > lists ? row : lists);
    if (part > size_t(most) || join > size_t(most)) return sample(p, stream);
    auto first = sample_part_kernel<T>;
    auto second = sample_join_kernel<T>;
    if (const cudaError_t refused = allow_smem(first, part)) return refused;
    if (const cudaError_t refused = allow_smem(second, join)) return refused;
    LAUNCH(first, dim3(unsigned(p.R * cut.parts)), dim3(threads), part, stream, p, cut, room);
    if (const cudaError_t error = cudaGetLastError()) return error;
    LAUNCH(second, dim3(unsigned(p.R)), dim3(kThreads), join, stream, p, cut.parts, room, keep);
    return cudaGetLastError();
  });
}

}  // namespace gptfast::cuda
