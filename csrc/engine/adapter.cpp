#include "adapter.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace gptfast::engine {

Adapter::Adapter(const Shape& shape, const std::vector<Source>& updates)
    : shape_(shape), updates_(size_t(numbered_matrices(shape))) {
  for (const Source& s : updates) {
    const auto [N, K] = size_of(shape, s.number);
    LowRank& u = updates_[size_t(s.number)];
    if (u.r) throw std::invalid_argument("adapter: matrix " + std::to_string(s.number) + " has two updates");
    u.r = s.r, u.scale = s.scale;
    max_rank_ = std::max(max_rank_, s.r);
    floats_ += s.r * (lora_stride(K) + panels(N) * kPanel);
  }
  memory_.grow(floats_);
  float* at = memory_.get();
  for (const Source& s : updates) {
    const auto [N, K] = size_of(shape, s.number);
    LowRank& u = updates_[size_t(s.number)];
    u.A = at;
    for (i64 j = 0; j < s.r; j++, at += lora_stride(K)) std::copy_n(s.A + j * s.lda, K, at);
    u.B = at;
    for (i64 n = 0; n < N; n++)
      for (i64 j = 0; j < s.r; j++) at[(n / kPanel * s.r + j) * kPanel + n % kPanel] = s.B[n * s.ldb + j];
    at += panels(N) * s.r * kPanel;
  }
}

bool Adapter::fits(const Shape& shape) const {
  return shape.layers == shape_.layers && shape.C == shape_.C && shape.F == shape_.F && shape.V == shape_.V &&
         shape.qkv() == shape_.qkv() && shape.attended() == shape_.attended() && shape.fc() == shape_.fc() &&
         shape.experts == shape_.experts;
}

}  // namespace gptfast::engine
