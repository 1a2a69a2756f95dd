// One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary: what a block does with a row,
// or a part of one, which it reads once and keeps in shared memory where it fits.
//
// A token's rank is a 64-bit number: its logit as an ordered integer above the complement of its id, so larger is better,
// ties go to the lowest id, and no two ranks are equal. Both cuts ask for the least rank such that the mass of the larger
// ones is below a goal: with mass 1 and goal k (top-k), or with mass exp((x - max) / T) and goal p times their sum
// (top-p). The interval that holds it is divided into as many bins as there are threads, and the masses of the bins are
// added up; the bin in which the goal is reached is divided again. Masses are integers in units of 2^-40, so the order of
// adding does not matter. Once a bin has no more tokens than there are threads, each thread holds one of them and the row
// is not read any more. The first interval is narrow: at least as many tokens as there are threads reach the least of the
// threads' largest logits, and a weight below (1 - p) Z / V is in no nucleus of mass p.
//
// Floor: one read of the row from memory; from shared memory then a pass for a draw, two more for top-k, three for top-p.
#pragma once
#include "common.cuh"
#include "mma.cuh"
#include "philox.cuh"

namespace gptfast::cuda::sampling {

using u64 = unsigned long long;
constexpr int kThreads = 1024;
constexpr i64 kMostTokens = i64(1) << 21;            // of a row: masses of 2^40 then fit 64 bits
constexpr int kInFlight = 4;                         // accesses of 16 bytes that a thread has on their way
constexpr float kMostNoise = 22.9f;                  // above -log(2^-33), the noise of the least v
constexpr u64 kAboveMinusInf = 0x00800000ull << 32;  // the least rank of a finite logit
constexpr u64 kNan = ~0ull;

DEV_INLINE u64 rank_of(float x, i64 token) {
  const uint32_t bits = __float_as_uint(x + 0.f);  // -0 ranks as 0
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return u64(key) << 32 | uint32_t(~token);
}
DEV_INLINE float logit_of(u64 rank) {
  const uint32_t key = uint32_t(rank >> 32);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
DEV_INLINE i64 token_of(u64 rank) { return uint32_t(~uint32_t(rank)); }

struct Add {
  DEV_INLINE u64 operator()(u64 a, u64 b) const { return a + b; }
};

// What the threads have seen of a row: the best rank of all and of the thread that has the least best one (kNan and 0 if
// there is a nan), and the number of finite logits.
struct Seen {
  u64 best, least, finite;
};
struct AddSeen {
  DEV_INLINE Seen operator()(const Seen& a, const Seen& b) const {
    return {a.best > b.best ? a.best : b.best, a.least < b.least ? a.least : b.least, a.finite + b.finite};
  }
};
struct Bin {
  u64 low, above;  // its least rank, the mass of the ranks above it
  unsigned count;
};

// Shared memory: reductions, the bin that was chosen, the number of listed tokens, the bins, the list, the row.
struct Shared {
  char* scratch;
  Bin* chosen;
  unsigned *listed, *counts, *low_words, *high_words;  // of bins: tokens, and the words of their mass
  u64* list;
  char* row;
  static constexpr size_t kScratch = 32 * sizeof(Seen), kFixed = kScratch + 48;
  static_assert(sizeof(Bin) <= 32);
  static size_t bytes(int threads, size_t row) { return kFixed + threads * (3 * sizeof(unsigned) + sizeof(u64)) + row; }
  DEV_INLINE explicit Shared(char* smem)
      : scratch(smem), chosen(reinterpret_cast<Bin*>(smem + kScratch)),
        listed(reinterpret_cast<unsigned*>(smem + kScratch + 32)), counts(reinterpret_cast<unsigned*>(smem + kFixed)),
        low_words(counts + blockDim.x), high_words(counts + 2 * blockDim.x),
        list(reinterpret_cast<u64*>(counts + 3 * blockDim.x)), row(reinterpret_cast<char*>(list + blockDim.x)) {}
};

// A row, or the part of it from token `first` on, a multiple of four, where it lies in memory, or in shared memory: from a
// 16-byte boundary on, filled up to whole groups of four.
template <class T> struct Row {
  const T* x;
  i64 V;
  bool kept;
  i64 first = 0;
  DEV_INLINE void group(i64 t, float (&v)[4]) const {
    if (kept && t < V) return load<4>(v, x + t);
#pragma unroll
    for (int k = 0; k < 4; k++) v[k] = t + k < V ? to_float(x[t + k]) : -INFINITY;
  }
};
// f(t, v, top) for every four tokens t .. t + 3, their logits and the largest of these; whole warps call together.
template <class T, class F> DEV_INLINE void for_groups(const Row<T>& row, F f) {
  for (i64 first = 4 * i64(threadIdx.x & ~31u); first < row.V; first += 4 * i64(blockDim.x)) {
    const i64 t = first + 4 * i64(threadIdx.x & 31);
    float v[4];
    row.group(t, v);
    f(row.first + t, v, fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])));
  }
}
// f(rank) for every token whose rank is at least `low`.
template <class T, class F> DEV_INLINE void for_ranks(const Row<T>& row, u64 low, F f) {
  const float least = logit_of(low);
  for_groups(row, [&](i64 t, const float (&v)[4], float top) {
    if (!(top >= least)) return;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const u64 rank = rank_of(v[k], t + k);
      if (v[k] >= least && rank >= low) f(rank);
    }
  });
}

// Ranks one by one.
struct List {
  const u64* ranks;
  i64 V;
};
template <class F> DEV_INLINE void for_ranks(const List& list, u64 low, F f) {
  for (i64 n = threadIdx.x; n < list.V; n += blockDim.x)
    if (list.ranks[n] >= low) f(list.ranks[n]);
}

// Reads a row, or a part of it from token `first` on, from memory, and copies it to `to` unless that is null.
template <class T> DEV_INLINE Seen read_row(const T* x, i64 V, T* to, const Shared& s, i64 first = 0) {
  constexpr int W = 16 / int(sizeof(T));
  float best = -INFINITY;
  i64 best_token = 0;
  unsigned finite = 0;
  bool has_nan = false;
  const auto see = [&](float v, i64 t) {
    if (v > best) best = v, best_token = t;  // the first of equals
    has_nan = has_nan || v != v;
    finite += v > -INFINITY;
  };
  const auto single = [&](i64 t) {
    const T value = x[t];
    if (to) to[t] = value;
    see(to_float(value), t);
  };
  const i64 before = i64(-reinterpret_cast<uintptr_t>(x) & 15) / i64(sizeof(T)), head = before < V ? before : V;
  const i64 words = (V - head) / W;
  for (i64 t = threadIdx.x; t < head; t += blockDim.x) single(t);
  for (i64 w = threadIdx.x; w < words; w += kInFlight * i64(blockDim.x)) {
    Raw<T, W> raw[kInFlight];
#pragma unroll
    for (int n = 0; n < kInFlight; n++)
      if (w + n * i64(blockDim.x) < words) raw[n].load(x + head + (w + n * i64(blockDim.x)) * W);
#pragma unroll
    for (int n = 0; n < kInFlight; n++) {
      if (w + n * i64(blockDim.x) >= words) break;
      const i64 t = head + (w + n * i64(blockDim.x)) * W;
      float v[W];
      raw[n].values(v);
      if (to && head == 0) raw[n].store(to + t);
#pragma unroll
      for (int k = 0; k < W; k++) {
        if (to && head != 0) from_float(to[t + k], v[k]);
        see(v[k], t + k);
      }
    }
  }
  for (i64 t = head + words * W + threadIdx.x; t < V; t += blockDim.x) single(t);
  if (to && threadIdx.x < 4 && V + threadIdx.x < (V + 3) / 4 * 4) from_float(to[V + threadIdx.x], -INFINITY);
  const u64 mine = best > -INFINITY ? rank_of(best, first + best_token) : 0;
  const Seen seen{has_nan ? kNan : mine, mine, finite};
  return block_reduce(seen, AddSeen{}, Seen{0, kNan, 0}, s.scratch);  // its barriers publish the copy
}

// The sum over this thread and those before it.
DEV_INLINE u64 running_sum(u64 x, const Shared& s) {
  u64* totals = reinterpret_cast<u64*>(s.scratch);
  const unsigned lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const u64 other = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += other;
  }
  if (lane == 31) totals[warp] = x;
  __syncthreads();
  return x + warp_reduce(lane < warp ? totals[lane] : 0, Add{});
}

// The least rank in low .. high such that the mass of the larger ones is < goal, or a number between it and the next
// smaller rank of a token; mass_of(rank) is an integer. The ranks in low .. high reach the goal, and none is above high. Where
// a mass is 1 a smaller rank will do that at most `enough` reach.
template <class Ranks, class Mass>
DEV_INLINE u64 select(const Ranks& row, u64 low, u64 high, double goal, Mass mass_of, const Shared& s, u64 enough = 0) {
  u64 above = 0;  // the mass of all ranks > high
  i64 count = row.V;
  bool listed = false;
  while (low < high && count > 1) {
    const auto inside = [&](u64 rank) { return rank >= low && rank <= high; };
    const int digits = 64 - __clzll(i64(high - low)), bin_digits = 31 - __clz(int(blockDim.x));
    const int shift = digits > bin_digits ? digits - bin_digits : 0;  // the bin of a rank is (rank - low) >> shift
    s.counts[threadIdx.x] = s.low_words[threadIdx.x] = s.high_words[threadIdx.x] = 0;
    if (threadIdx.x == 0 && !listed) *s.listed = 0;
    __syncthreads();
    if (!listed && count <= i64(blockDim.x)) {
      for_ranks(row, low, [&](u64 rank) {
        if (inside(rank)) s.list[atomicAdd(s.listed, 1u)] = rank;
      });
      __syncthreads();
      listed = true;
    }
    const auto add = [&](u64 rank) {
      if (!inside(rank)) return;
      const unsigned b = unsigned((rank - low) >> shift);
      const u64 mass = mass_of(rank);
      const unsigned word = unsigned(mass), old = atomicAdd(&s.low_words[b], word);
      const unsigned carry = unsigned(mass >> 32) + (old + word < old);
      if (carry) atomicAdd(&s.high_words[b], carry);
      atomicAdd(&s.counts[b], 1u);
    };
    if (!listed) for_ranks(row, low, add);
    else if (threadIdx.x < *s.listed) add(s.list[threadIdx.x]);
    __syncthreads();
    const unsigned bin = blockDim.x - 1 - threadIdx.x;  // from the best one down
    const u64 mass = u64(s.high_words[bin]) << 32 | s.low_words[bin];
    const u64 until = above + running_sum(mass, s), before = until - mass;
    if (!(double(before) >= goal) && (double(until) >= goal || bin == 0))
      *s.chosen = {low + (u64(bin) << shift), before, s.counts[bin]};
    __syncthreads();
    const u64 last = s.chosen->low + ((1ull << shift) - 1);
    low = s.chosen->low, above = s.chosen->above, count = s.chosen->count;
    high = last < high ? last : high;
    if (above + u64(count) <= enough) break;
  }
  return low;
}

// exp((x - best) / T) in units of 2^-40.
struct Weight {
  float best, per_unit;
  DEV_INLINE u64 operator()(u64 rank) const { return u64(exp2f((logit_of(rank) - best) * per_unit) * 0x1p40f); }
};
struct One {
  DEV_INLINE u64 operator()(u64) const { return 1; }
};
// The least rank of the nucleus of what reaches `lowest`, in a row of V tokens.
template <class Ranks>
DEV_INLINE u64 nucleus(const Ranks& row, i64 V, const SampleOptions& o, float per_unit, u64 best_rank, u64 lowest,
                       const Shared& s) {
  const float best = logit_of(best_rank);
  const Weight weight{best, per_unit};
  u64 mass = 0;
  for_ranks(row, lowest, [&](u64 rank) { mass += weight(rank); });
  const double total = double(block_reduce(mass, Add{}, 0ull, s.scratch));
  const float share = float(0.999 * (1 - o.top_p) * total / double(V)), units = log2f(share < 0.9f ? 0.9f : share);
  const float logit = best + (units - 40.f) / per_unit, slack = 1e-5f * (fabsf(best) + fabsf(logit));
  const u64 low = logit - slack > logit_of(kAboveMinusInf) ? rank_of(logit - slack, 0xffffffff) : lowest;
  return select(row, low > lowest ? low : lowest, best_rank, o.top_p * total, weight, s);
}
// The cuts: what is drawn from are the ranks from the result on.
template <class T>
DEV_INLINE u64 least_kept(const Row<T>& row, const SampleOptions& o, float per_unit, const Seen& seen,
                          const Shared& s) {
  u64 lowest = kAboveMinusInf;
  if (o.top_k > 0 && o.top_k < i64(seen.finite)) {
    const bool many = seen.least > lowest && o.top_k <= i64(blockDim.x);
    lowest = select(row, many ? seen.least : lowest, seen.best, double(o.top_k), One{}, s);
  }
  return o.top_p < 1 ? nucleus(row, row.V, o, per_unit, seen.best, lowest, s) : lowest;
}

}  // namespace gptfast::cuda::sampling
