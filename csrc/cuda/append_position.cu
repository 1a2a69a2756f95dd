// The keys and values of one new position a row, into the cache, in one launch for both: a word of up to 16 bytes a thread.
#include "common.cuh"
#include "decode_attention.h"

namespace gptfast::cuda {
namespace {

constexpr int kThreads = 256;

// `words` of W are a head's row.
template <class W> __global__ void __launch_bounds__(kThreads) append_position_kernel(const NewPosition p, int words) {
  const i64 n = i64(blockIdx.x) * kThreads + threadIdx.x, row = n / words;
  if (row >= 2 * p.B * p.heads) return;
  const i64 b = row / 2 / p.heads, h = row / 2 % p.heads, word = n % words;
  const i64 at = p.lengths[b];
  if (row % (2 * p.heads) == 0 && word == 0) p.seen[b] = at < 0 ? 0 : at < p.S ? at + 1 : p.S;
  if (at < 0 || at >= p.S) return;
  const Heads& from = row % 2 ? p.v : p.k;
  const MutHeads& to = row % 2 ? p.values : p.keys;
  const i64 size = p.dtype == DType::f32 ? 4 : 2;
  const char* source = static_cast<const char*>(from.data) + (b * from.sb + h * from.sh) * size;
  char* target = static_cast<char*>(to.data) + (b * to.sb + h * to.sh + at * to.st) * size;
  EXPECT_ALIGNED(source, sizeof(W));
  EXPECT_ALIGNED(target, sizeof(W));
  reinterpret_cast<W*>(target)[word] = reinterpret_cast<const W*>(source)[word];
}

template <class W> cudaError_t launch(const NewPosition& p, cudaStream_t stream) {
  const int words = int(p.D * element_size(p.dtype) / i64(sizeof(W)));
  const i64 blocks = ceil_div(2 * p.B * p.heads * words, kThreads);
  auto kernel = append_position_kernel<W>;
  LAUNCH(kernel, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, words);
  return cudaGetLastError();
}

template <class H> uintptr_t bits_of(const H& x, DType dtype) {
  return reinterpret_cast<uintptr_t>(x.data) | uintptr_t((x.sb | x.sh | x.st) * element_size(dtype));
}

}  // namespace

cudaError_t append_position(const NewPosition& p, cudaStream_t stream) {
  if (!p.B || !p.heads) return cudaSuccess;
  const uintptr_t bits = bits_of(p.k, p.dtype) | bits_of(p.v, p.dtype) | bits_of(p.keys, p.dtype) |
                         bits_of(p.values, p.dtype) | uintptr_t(p.D * element_size(p.dtype));
  if (bits % 16 == 0) return launch<uint4>(p, stream);
  return p.dtype == DType::f32 ? launch<uint32_t>(p, stream) : launch<uint16_t>(p, stream);
}

}  // namespace gptfast::cuda
