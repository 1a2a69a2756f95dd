// quantized_linear for few rows of x, as in decoding: what counts is that every byte of the weight is read once, 16 at a time,
// with enough of them on their way.
//
// A warp has 16 outputs, its lanes 16 bytes of codes each: lane (g, t) = (lane / 4, lane % 4) those of outputs g and g + 8 at
// chunk t of a step of 64 bytes. They become pairs of 16 bits, which are operands of mma as they lie. Columns of the second
// operand are rows of x; since scales belong to groups, each column holds x in one group alone and zeros in the others, and a
// lane's results belong to the group that its codes do. Sums are of fp32, scaled in fp32. x in fp32 takes fp32's own
// multiply-adds.
//
// The warps of a block share the steps of a row, or have rows of their own where those are short; their sums are added in
// order. Blocks stay, and ask for the next codes before they use the last. The order of a sum depends on K alone: y has the same
// bits however many rows x has, and on every GPU.
//
// Floor: one read of codes and scales. Each 8 rows read them again, from L2; each 4 where groups
// are of 16 bytes, and each 2 of fp32.
#include "quantized_codes.cuh"

namespace gptfast::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlocks = 2;  // of a multiprocessor
constexpr int kOutputs = 16, kRows = 8 /* at most */, kChunk = 16, kStep = 4 * kChunk, kSteps = 4;
constexpr int kTurn = kSteps * kStep;  // bytes
constexpr int kMostRows = 32, kFoundBytes = 2 * kWarps * kRows * kOutputs * int(sizeof(float));

struct Split {
  int warps;      // of a block share a row of codes
  int turns;      // of kSteps steps that each has of it
  int tiles;      // of outputs, kOutputs * kWarps / warps each
  int shared;     // lanes of a step whose codes have one scale
  int rows_each;  // of x in a block of them: as many as registers can sum
  int rows;       // blocks of rows
};

// What a lane reads of one step: of outputs g and g + 8. A scale of 0 where there are no codes.
struct Step {
  uint4 codes[2];
  uint32_t scales[2];
};
// Where a lane is in the first of its two rows of codes and of scales; the second is eight rows on.
template <Codes F> struct Place {
  static constexpr int PER_BYTE = kCodesOfWord<F> / 4;
  const uint8_t* codes;
  const char* scales;
  int outputs;  // of the warp from its first on that there are
  int left;     // bytes of the row from the warp's first on

  DEV_INLINE void at_item(const PackedWeight& w, const Split& split, int item) {
    const int warp = int(threadIdx.x) / 32, tile = item / split.rows * (kWarps / split.warps) + warp / split.warps;
    const i64 n0 = i64(tile) * kOutputs, n = n0 + int(threadIdx.x) % 32 / 4;
    const int first = warp % split.warps * kTurn, at = first + int(threadIdx.x) % 4 * kChunk;
    outputs = w.N - n0 < kOutputs ? int(w.N - n0) : kOutputs, left = int(w.row_bytes) - first;
    codes = w.codes + n * w.row_bytes + at;
    scales = static_cast<const char*>(w.scales) + (n * w.groups + (at * PER_BYTE >> w.group_shift)) * scale_bytes<F>(w);
  }
  DEV_INLINE void advance(const PackedWeight& w, const Split& split) {
    const int bytes = split.warps * kTurn;
    codes += bytes, left -= bytes, scales += (bytes * PER_BYTE >> w.group_shift) * scale_bytes<F>(w);
  }
  // Asks for step s of the turn.
  DEV_INLINE void load(Step& to, const PackedWeight& w, int s) const {
    const int lane = threadIdx.x % 32;
    if (outputs == kOutputs && left >= (s + 1) * kStep) {  // all of it, in all lanes
      load_codes(to, w, s, 0), load_codes(to, w, s, 1);
      load_scale(to, w, s, 0), load_scale(to, w, s, 1);
    } else {
#pragma unroll
      for (int o = 0; o < 2; o++) {
        to.codes[o] = make_uint4(0, 0, 0, 0), to.scales[o] = 0;
        if (lane / 4 + o * 8 < outputs && left > s * kStep + lane % 4 * kChunk)
          load_codes(to, w, s, o), load_scale(to, w, s, o);
      }
    }
  }

 private:
  DEV_INLINE void load_codes(Step& to, const PackedWeight& w, int s, int o) const {
    to.codes[o] = __ldcs(reinterpret_cast<const uint4*>(codes + o * 8 * w.row_bytes + s * kStep));
  }
  DEV_INLINE void load_scale(Step& to, const PackedWeight& w, int s, int o) const {
    const int size = scale_bytes<F>(w), step = (s * kStep * PER_BYTE >> w.group_shift) * size;
    const char* from = scales + o * i64(8 * size) * w.groups + step;
    to.scales[o] = scale_bits<F>(w, from, 0);
  }
};

__device__ const uint4 kZeros[4] = {};  // as long as the columns of a chunk in 16 bits

// Sums of a lane: of outputs g and g + 8, for COUNT rows of x.
template <class T, Codes F, int SETS> struct Products {  // in 16 bits: sets of 2 * shared rows
  static constexpr int COUNT = 2 * SETS, PER_WORD = kCodesOfWord<F>;
  int row;  // of x in the first set; past the last where this lane's column holds zeros
  float sums[2][COUNT];

  DEV_INLINE void begin(const QuantizedLinearParams& p, const Split& split, int m0) {
    const int column = int(threadIdx.x) % 32 / 4, t = threadIdx.x % 4, each = 2 * split.shared;
    row = t / split.shared == column / each ? m0 + column % each : p.M;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[0][i] = sums[1][i] = 0.f;
  }
  // Codes of columns k … of this lane; `inside` the row.
  DEV_INLINE void add(const QuantizedLinearParams& p, const Split& split, const uint4 (&codes)[2],
                      const uint32_t (&bits)[2], int k, bool inside, const Decoder<T>& decoder) {
    float part[SETS][4] = {};
    const uint4* from[SETS];  // zeros are read like x, without a branch
#pragma unroll
    for (int s = 0; s < SETS; s++) {
      const int m = row + s * 2 * split.shared;
      from[s] = kZeros;
      if (inside && m < p.M)
        from[s] = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x.data) + m * p.x.stride + k);
    }
    constexpr int AT_ONCE = 8 / PER_WORD;  // words that meet 16 bytes of x
#pragma unroll
    for (int i = 0; i < 4; i += AT_ONCE) {
      uint4 x[SETS];
#pragma unroll
      for (int s = 0; s < SETS; s++) x[s] = from[s][i / AT_ONCE];
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        uint32_t low[PER_WORD / 2], high[PER_WORD / 2];
        word_pairs<T, F>(word_at(codes[0], i + j), decoder, low);
        word_pairs<T, F>(word_at(codes[1], i + j), decoder, high);
#pragma unroll
        for (int pair = 0; pair < PER_WORD / 2; pair += 2) {
          const uint32_t a[4] = {low[pair], high[pair], low[pair + 1], high[pair + 1]};
          const int word = j * PER_WORD / 2 + pair;
#pragma unroll
          for (int s = 0; s < SETS; s++) mma_16<T>(part[s], a, word_at(x[s], word), word_at(x[s], word + 1));
        }
      }
    }
    float scales[2];
    scale_values<F>(scales, p.w, bits);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
#pragma unroll
      for (int o = 0; o < 2; o++) sums[o][i] = fmaf(part[i / 2][2 * o + i % 2], scales[o], sums[o][i]);
  }
  // Lanes that hold results once those of other groups are added, and the row of sum i.
  static DEV_INLINE int lanes(const Split& split) { return split.shared; }
  static DEV_INLINE int row_of(const Split& split, int i) {
    return i / 2 * 2 * split.shared + int(threadIdx.x) % 4 * 2 + i % 2;
  }
};
template <Codes F, int ROWS> struct Products<float, F, ROWS> {
  static constexpr int COUNT = ROWS, PER_WORD = kCodesOfWord<F>;
  const float* rows;
  int valid;
  float sums[2][COUNT];

  DEV_INLINE void begin(const QuantizedLinearParams& p, const Split&, int m0) {
    rows = static_cast<const float*>(p.x.data) + m0 * p.x.stride, valid = p.M - m0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[0][i] = sums[1][i] = 0.f;
  }
  DEV_INLINE void add(const QuantizedLinearParams& p, const Split&, const uint4 (&codes)[2], const uint32_t (&bits)[2],
                      int k, bool inside, const Decoder<float>& decoder) {
    float part[2][COUNT] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float w[2][PER_WORD];
      word_values<F>(word_at(codes[0], i), decoder, w[0]), word_values<F>(word_at(codes[1], i), decoder, w[1]);
#pragma unroll
      for (int c = 0; c < PER_WORD; c += 4)
#pragma unroll
        for (int m = 0; m < COUNT; m++) {
          float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
          if (inside && m < valid) x = *reinterpret_cast<const float4*>(rows + m * p.x.stride + k + i * PER_WORD + c);
#pragma unroll
          for (int o = 0; o < 2; o++)
            part[o][m] =
                fmaf(w[o][c + 3], x.w, fmaf(w[o][c + 2], x.z, fmaf(w[o][c + 1], x.y, fmaf(w[o][c], x.x, part[o][m]))));
        }
    }
    float scales[2];
    scale_values<F>(scales, p.w, bits);
#pragma unroll
    for (int m = 0; m < COUNT; m++)
#pragma unroll
      for (int o = 0; o < 2; o++) sums[o][m] = fmaf(part[o][m], scales[o], sums[o][m]);
  }
  static DEV_INLINE int lanes(const Split&) { return 1; }
  static DEV_INLINE int row_of(const Split&, int i) { return i; }
};

template <class T, Codes F, int SETS>
__global__ void __launch_bounds__(kThreads, kBlocks)
    quantized_rows(const __grid_constant__ QuantizedLinearParams p, const Split split, int items) {
  constexpr int PER_BYTE = kCodesOfWord<F> / 4;
  DYN_SMEM(smem);
  float* found = reinterpret_cast<float*>(smem);  // in turn, of each warp: kRows x kOutputs sums
  const Decoder<T> decoder{smem + kFoundBytes};
  const int lane = threadIdx.x % 32, warp = int(threadIdx.x) / 32, bytes = split.warps * kTurn;
  const int first = warp % split.warps * kTurn + lane % 4 * kChunk;

  constexpr int DEPTH = SETS == 1 ? kSteps : kSteps / 2;  // steps on their way: as many as registers can take
  Step steps[DEPTH];
  Place<F> place;
  int item = blockIdx.x;
  place.at_item(p.w, split, item);
#pragma unroll
  for (int s = 0; s < DEPTH; s++) place.load(steps[s], p.w, s);
  if constexpr (kLooksUp<T, F>) decoder.template fill<F>(smem + kFoundBytes), __syncthreads();
  Products<T, F, SETS> products;
  for (int turn_of = 0; item < items; item += int(gridDim.x), turn_of ^= 1) {
    auto first_row = [&] { return item % split.rows * split.rows_each; };
    products.begin(p, split, first_row());
    for (int number = 0; number < split.turns; number++) {
      const int at = first + number * bytes;
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
        Step& step = steps[s % DEPTH];
        products.add(p, split, step.codes, step.scales, (at + s * kStep) * PER_BYTE, at + s * kStep < p.w.row_bytes,
                     decoder);
        if (s == kSteps - DEPTH) {  // the next turn; past the last item it is empty
          if (number + 1 < split.turns) place.advance(p.w, split);
          else place.at_item(p.w, split, item + int(gridDim.x));
        }
        place.load(step, p.w, (s + DEPTH) % kSteps);
      }
    }

    const int lanes = products.lanes(split);
    float* own = found + (turn_of * kWarps + warp) * kRows * kOutputs;
#pragma unroll
    for (int i = 0; i < products.COUNT; i++)
#pragma unroll
      for (int o = 0; o < 2; o++) {
        float sum = products.sums[o][i];
        for (int distance = 2; distance >= lanes; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
        if (lane % 4 < lanes) own[products.row_of(split, i) * kOutputs + lane / 4 + o * 8] = sum;
      }
    __syncthreads();  // the sums of the next item lie elsewhere, and this barrier is between them and those of the one after
    const int width = kOutputs * (kWarps / split.warps);
    for (int i = int(threadIdx.x); i < width * split.rows_each; i += kThreads) {
      const int m = first_row() + i / width, c = i % width;
      const i64 n = i64(item / split.rows) * width + c;
      if (m >= p.M || n >= p.w.N) continue;
      const float* from = found + (turn_of * kWarps + c / kOutputs * split.warps) * kRows * kOutputs +
                          i / width * kOutputs + c % kOutputs;
      float y[1] = {0.f}, bias[1] = {0.f};
      for (int k = 0; k < split.warps; k++) y[0] += from[k * kRows * kOutputs];
      if (p.bias.data) load_any<1>(bias, p.bias.data, p.bias.dtype, n);
      y[0] += bias[0];
      store<1>(static_cast<T*>(p.y.data) + m * p.y.stride + n, y);
    }
  }
}

template <class T, Codes F, int SETS>
cudaError_t launch(const QuantizedLinearParams& p, const Split& split, cudaStream_t stream) {
  int processors = 0;
  if (const cudaError_t error = multiprocessors(&processors)) return error;
  const i64 items = i64(split.tiles) * split.rows, most = i64(processors) * kBlocks;
  const size_t smem = kFoundBytes + (kLooksUp<T, F> ? Decoder<T>::BYTES : 0);
  auto kernel = quantized_rows<T, F, SETS>;
  LAUNCH(kernel, dim3(unsigned(items < most ? items : most)), dim3(kThreads), smem, stream, p, split, int(items));
  return cudaGetLastError();
}
template <class T, Codes F>
cudaError_t launch_rows(const QuantizedLinearParams& p, const Split& split, cudaStream_t stream) {
  const i64 rows = p.M < split.rows_each ? p.M : split.rows_each;
  const i64 sets = sizeof(T) == 4 ? rows : ceil_div(rows, 2 * split.shared);
  return sets > 1 ? launch<T, F, 2>(p, split, stream) : launch<T, F, 1>(p, split, stream);
}

}  // namespace

bool quantized_linear_few_takes(const QuantizedLinearParams& p) {
  return !p.transposed && p.M <= (p.x.dtype == DType::f32 ? 8 : kMostRows);
}

cudaError_t quantized_linear_few(const QuantizedLinearParams& p, cudaStream_t stream) {
  const i64 turns = ceil_div(p.w.row_bytes, kTurn);
  Split split{};
  split.warps = kWarps;
  while (split.warps > 1 && split.warps > turns) split.warps /= 2;
  split.turns = int(ceil_div(turns, split.warps));
  split.tiles = int(ceil_div(p.w.N, kOutputs * (kWarps / split.warps)));
  const int lanes = (1 << p.w.group_shift) / (p.w.format == Codes::int8 ? 16 : 32);
  split.shared = lanes < 4 ? lanes : 4;
  split.rows_each = p.x.dtype == DType::f32 ? 2 : split.shared == 1 ? 4 : 8;
  split.rows = int(ceil_div(p.M, split.rows_each));
  return with_dtype(p.x.dtype, [&](auto t) {
    using T = decltype(t);
    return with_codes(p.w.format, [&](auto f) { return launch_rows<T, decltype(f)::value>(p, split, stream); });
  });
}

}  // namespace gptfast::cuda
