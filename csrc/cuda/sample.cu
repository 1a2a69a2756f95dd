// One token per row of logits: temperature, top-k, top-p, draw, without sorting the vocabulary. A block has a row, which
// it reads once and keeps in shared memory where it fits.
//
// A token's rank is a 64-bit number: its logit as an ordered integer above the complement of its id, so larger is better,
// ties go to the lowest id, and no two ranks are equal. Both cuts ask for the least rank such that the mass of the larger
// ones is below a goal: with mass 1 and goal k (top-k), or with mass exp((x - max) / T) and goal p times their sum
// (top-p). It is found digit by digit, two bits at a time, adding up the mass of every digit; masses are integers in units
// of 2^-40, so the order of adding does not matter. Once the digits so far leave no more candidates than there are
// threads, each thread holds one candidate and the row is not read any more.
//
// The draw is the Gumbel maximum argmax x / T + noise (Maddison et al., arXiv 1411.0030): philox.cuh.
// Floor: one read of the row from memory; from shared memory then one pass a digit until the candidates are few, one for
// the draw.
#include "common.cuh"
#include "philox.cuh"

namespace gptfast::cuda {
namespace {

using u64 = unsigned long long;
constexpr int kThreads = 1024;
constexpr int kDigitBits = 2;
constexpr int kCountBits = 21;                       // three counts share a word
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
// Masses of the digits 3, 2, 1 among the candidates, and their counts.
struct Digits {
  u64 mass[3], counts;
};
struct AddDigits {
  DEV_INLINE Digits operator()(const Digits& a, const Digits& b) const {
    return {{a.mass[0] + b.mass[0], a.mass[1] + b.mass[1], a.mass[2] + b.mass[2]}, a.counts + b.counts};
  }
};

// Shared memory: reductions, the number of listed candidates, the list, the row.
struct Shared {
  char* scratch;
  unsigned* listed;
  u64* list;
  char* row;
  static constexpr size_t kScratch = 32 * sizeof(Digits);
  static size_t bytes(int threads, size_t row) { return kScratch + 16 + threads * sizeof(u64) + row; }
  DEV_INLINE explicit Shared(char* smem)
      : scratch(smem), listed(reinterpret_cast<unsigned*>(smem + kScratch)),
        list(reinterpret_cast<u64*>(smem + kScratch + 16)), row(smem + kScratch + 16 + blockDim.x * sizeof(u64)) {}
};

// The least rank >= lowest among x[0 .. V) such that the mass of the larger ones is < goal; mass_of(rank) is an integer.
// `count` ranks are >= lowest, and their mass is at least the goal.
template <class T, class Mass>
DEV_INLINE u64 descend(const T* x, i64 V, u64 lowest, i64 count, double goal, Mass mass_of, const Shared& s) {
  u64 prefix = 0, above = 0;  // the digits so far; the mass of all ranks that are larger
  bool listed = false;
  for (int shift = 64; shift > 0 && count > 1;) {
    const auto candidate = [&](u64 rank) { return rank >= lowest && (shift == 64 || rank >> shift == prefix); };
    if (!listed && count <= i64(blockDim.x)) {
      __syncthreads();
      if (threadIdx.x == 0) *s.listed = 0;
      __syncthreads();
      for (i64 t = threadIdx.x; t < V; t += blockDim.x) {
        const u64 rank = rank_of(to_float(x[t]), t);
        if (candidate(rank)) s.list[atomicAdd(s.listed, 1u)] = rank;
      }
      __syncthreads();
      listed = true;
    }
    const int below = shift - kDigitBits;
    Digits mine{};
    const auto add = [&](u64 rank) {
      if (!candidate(rank)) return;
      const int digit = int(rank >> below & 3);
      const u64 mass = mass_of(rank);
#pragma unroll
      for (int d = 3; d > 0; d--) mine.mass[3 - d] += digit == d ? mass : 0;
      mine.counts += digit ? 1ull << (kCountBits * (3 - digit)) : 0;
    };
    if (!listed)
      for (i64 t = threadIdx.x; t < V; t += blockDim.x) add(rank_of(to_float(x[t]), t));
    else if (threadIdx.x < *s.listed) add(s.list[threadIdx.x]);
    const Digits all = block_reduce(mine, AddDigits{}, Digits{}, s.scratch);
    int digit = 3;
    i64 left = count;
    for (; digit > 0; digit--) {  // from the best digit down, until the goal is reached
      const i64 n = i64(all.counts >> (kCountBits * (3 - digit)) & ((1ull << kCountBits) - 1));
      left -= n;
      if (double(above + all.mass[3 - digit]) >= goal) {
        left = n;
        break;
      }
      above += all.mass[3 - digit];
    }
    count = left;
    prefix = prefix << kDigitBits | u64(digit);
    shift = below;
    if (shift == 0) return prefix;
    if (count <= 1) return prefix << shift > lowest ? prefix << shift : lowest;
  }
  return lowest;
}

// exp((x - best) / T) in units of 2^-40.
struct Weight {
  float best, per_unit;
  DEV_INLINE u64 operator()(u64 rank) const { return u64(exp2f((logit_of(rank) - best) * per_unit) * 0x1p40f); }
};

struct Scored {
  float score;
  uint32_t token;
};
struct Better {
  DEV_INLINE Scored operator()(Scored a, Scored b) const {
    return a.score > b.score || (a.score == b.score && a.token < b.token) ? a : b;
  }
};
// The draw among the ranks >= lowest. One Philox call gives the words of four tokens.
template <class T> DEV_INLINE i64 draw(const SampleParams& p, const T* x, u64 lowest, i64 r, const Shared& s) {
  Scored mine{-INFINITY, 0xffffffffu};
  for (i64 t0 = 4 * i64(threadIdx.x); t0 < p.V; t0 += 4 * i64(blockDim.x)) {
    float v[4];
    bool keep[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      v[k] = t0 + k < p.V ? to_float(x[t0 + k]) : -INFINITY;
      keep[k] = t0 + k < p.V && rank_of(v[k], t0 + k) >= lowest;
    }
    if (!(keep[0] || keep[1] || keep[2] || keep[3])) continue;
    const uint4 words =
        philox4x32(p.seed, uint32_t(t0 / 4), uint32_t(p.position[r]), uint32_t(p.stream[r]), kSamplingDomain);
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (keep[k]) mine = Better{}(mine, {v[k] / p.temperature + gumbel_noise(word_of(words, k)), uint32_t(t0 + k)});
  }
  return block_reduce(mine, Better{}, Scored{-INFINITY, 0xffffffffu}, s.scratch).token;
}

template <class T>
DEV_INLINE i64 sample_row(const SampleParams& p, const T* x, i64 r, bool in_shared, const Shared& s) {
  u64 best_rank = 0;
  T* copy = reinterpret_cast<T*>(s.row);
  for (i64 t = threadIdx.x; t < p.V; t += blockDim.x) {
    const T value = x[t];
    if (in_shared) copy[t] = value;
    const float v = to_float(value);
    best_rank = Max{}(best_rank, v == v ? rank_of(v, t) : kNan);
  }
  best_rank = block_reduce(best_rank, Max{}, 0ull, s.scratch);  // its barriers publish the copy too
  if (in_shared) x = copy;
  if (best_rank == kNan) return -1;
  if (best_rank < kAboveMinusInf) return -2;
  const float best = logit_of(best_rank);
  if (p.temperature < 0x1p-126f || !(fabsf(best / p.temperature) < 1e30f))
    return token_of(best_rank);  // noise is nothing

  u64 lowest = kAboveMinusInf;
  const bool cut_k = p.top_k > 0 && p.top_k < p.V;
  if (!cut_k && p.top_p >= 1) return draw(p, x, lowest, r, s);
  u64 finite = 0;
  for (i64 t = threadIdx.x; t < p.V; t += blockDim.x) finite += rank_of(to_float(x[t]), t) >= lowest;
  i64 count = i64(block_reduce(finite, Add{}, 0ull, s.scratch));
  if (cut_k && p.top_k < count) {
    lowest = descend(x, p.V, lowest, count, double(p.top_k), [](u64) { return 1ull; }, s);
    count = p.top_k;
  }
  if (p.top_p < 1) {
    const float per_unit = kLog2e / p.temperature;
    const Weight weight{best, per_unit < 3.4028235e38f ? per_unit : 3.4028235e38f};
    u64 mass = 0;
    for (i64 t = threadIdx.x; t < p.V; t += blockDim.x) {
      const u64 rank = rank_of(to_float(x[t]), t);
      if (rank >= lowest) mass += weight(rank);
    }
    const double total = double(block_reduce(mass, Add{}, 0ull, s.scratch));
    lowest = descend(x, p.V, lowest, count, p.top_p * total, weight, s);
  }
  return draw(p, x, lowest, r, s);
}

template <class T> __global__ void __launch_bounds__(kThreads) sample_kernel(const SampleParams p, bool in_shared) {
  DYN_SMEM(smem);
  const Shared s(smem);
  const i64 r = blockIdx.x;
  const i64 token = sample_row(p, static_cast<const T*>(p.logits.data) + r * p.logits.stride, r, in_shared, s);
  if (threadIdx.x == 0) p.out[r] = token;
}

}  // namespace

cudaError_t sample(const SampleParams& p, cudaStream_t stream) {
  if (!p.R) return cudaSuccess;
  if (p.V >= i64(1) << kCountBits) return cudaErrorInvalidValue;
  int device = 0, most = 0;
  cudaError_t error = cleared(cudaGetDevice(&device));
  if (error == cudaSuccess)
    error = cleared(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (error != cudaSuccess) return error;
  return with_dtype(p.logits.dtype, [&](auto t) {
    using T = decltype(t);
    const int threads = round_to_warps(ceil_div(p.V, 8), kThreads);
    const size_t with_row = Shared::bytes(threads, size_t(p.V) * sizeof(T));
    const bool in_shared = with_row <= size_t(most);
    const size_t bytes = in_shared ? with_row : Shared::bytes(threads, 0);
    auto kernel = sample_kernel<T>;
    const cudaError_t refused = allow_smem(kernel, bytes);
    if (refused != cudaSuccess) return refused;
    LAUNCH(kernel, dim3(unsigned(p.R)), dim3(threads), bytes, stream, p, in_shared);
    return cudaGetLastError();
  });
}

}  // namespace gptfast::cuda
