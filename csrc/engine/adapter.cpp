#include "adapter.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pack.h"

namespace gptfast::engine {

namespace {

void put(char* memory, bool half, i64 i, float value) {
  if (half) reinterpret_cast<uint16_t*>(memory)[i] = to_bf16(value);
  else reinterpret_cast<float*>(memory)[i] = value;
}

}  // namespace

Adapter::Adapter(const Shape& shape, bool half, const std::vector<Source>& updates)
    : shape_(shape), updates_(size_t(numbered_matrices(shape))) {
  for (const Source& s : updates) {
    const auto [N, K] = size_of(shape, s.number);
    LowRank& u = updates_[size_t(s.number)];
    if (u.r) throw std::invalid_argument("adapter: matrix " + std::to_string(s.number) + " has two updates");
    u.half = half, u.r = s.r, u.scale = s.scale, u.row = lora_stride(K) * (half ? 2 : 4);
    max_rank_ = std::max(max_rank_, s.r);
    bytes_ += u.r * u.row + panels(N) * u.panel();
  }
  memory_.grow(bytes_);
  char* at = memory_.get();
  for (const Source& s : updates) {
    const auto [N, K] = size_of(shape, s.number);
    LowRank& u = updates_[size_t(s.number)];
    u.A = at;
    for (i64 j = 0; j < s.r; j++, at += u.row)
      for (i64 k = 0; k < K; k++) put(at, half, k, s.A[j * s.lda + k]);
    u.B = at;
    for (i64 n = 0; n < N; n++)
      for (i64 j = 0; j < s.r; j++) put(at, half, (n / kPanel * s.r + j) * kPanel + n % kPanel, s.B[n * s.ldb + j]);
    at += panels(N) * u.panel();
  }
}

bool Adapter::fits(const Shape& shape) const {
  return shape.layers == shape_.layers && shape.C == shape_.C && shape.F == shape_.F && shape.V == shape_.V &&
         shape.qkv() == shape_.qkv() && shape.attended() == shape_.attended() && shape.fc() == shape_.fc() &&
         shape.experts == shape_.experts;
}

}  // namespace gptfast::engine
