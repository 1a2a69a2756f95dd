// Low-rank updates of a model's matrices (LoRA): y = x W^T + scale (x A^T) B^T for the rows of sequences that have them.
//
// Floor of decoding: A and B are read once beside W, 2 r (N + K) bytes in bf16 and twice these in fp32. The sums of a row run in
// the same order whatever other rows there are.
#pragma once
#include <memory>
#include <vector>

#include "buffer.h"
#include "kernels.h"
#include "model.h"

namespace gptfast::engine {

// The updates of one adapter, by the number of their matrix (Linear::number).
class Adapter {
 public:
  struct Source {  // A (r, K) and B (N, r), rows so far apart
    i64 number, r;
    float scale;
    const float *A, *B;
    i64 lda, ldb;
  };
  // half: A and B are rounded to bf16. std::invalid_argument: a matrix twice.
  Adapter(const Shape& shape, bool half, const std::vector<Source>& updates);

  bool fits(const Shape& shape) const;
  // r == 0: none.
  const LowRank& of(i64 number) const { return updates_[size_t(number)]; }
  i64 max_rank() const { return max_rank_; }
  i64 bytes() const { return bytes_; }

 private:
  Shape shape_;
  std::vector<LowRank> updates_;
  i64 max_rank_ = 0, bytes_ = 0;
  Buffer<char> memory_;
};
using Adapters = std::vector<std::shared_ptr<const Adapter>>;  // of one sequence: they are added up

}  // namespace gptfast::engine
