// The low-rank updates of a pass: which rows have adapters, and what these add to the products of a matrix.
#include <algorithm>

#include "engine.h"

namespace gptfast::engine {

// Neighbouring rows of sequences with the same adapters are updated together.
void Engine::note_adapters() {
  updated_.clear();
  updated_wanted_.clear();
  ldh_ = 0;
  const auto note = [](std::vector<Updated>& rows, i64 first, i64 n, const Adapters* adapters) {
    if (!n) return;
    if (!rows.empty() && rows.back().first + rows.back().n == first && *rows.back().adapters == *adapters)
      rows.back().n += n;
    else rows.push_back({first, n, adapters});
  };
  for (const Run& run : runs_) {
    if (run.adapters->empty()) continue;
    note(updated_, run.first, run.n, run.adapters);
    note(updated_wanted_, run.row, run.wanted, run.adapters);
    i64 ranks = 0;
    for (const auto& adapter : *run.adapters) ranks += adapter->max_rank();
    ldh_ = std::max(ldh_, ranks);
  }
  if (updated_.empty()) return;
  shared_.down.grow(M_ * ldh_);
  for (Thread& own : own_) own.inputs.down.grow(ldh_);
}

// x A^T of rows first to last, as far as they have adapters; those of one row one after another.
void Engine::project(const Linear& linear, const Activations& x, i64 K, Rows rows, i64 first, i64 last, Inputs& to) {
  for (const Updated& part : *rows.updated) {
    const i64 m = std::max(first, part.first), n = std::min(last, part.first + part.n) - m;
    if (n <= 0) continue;
    float* h = to.down.get() + m * ldh_;
    for (const auto& adapter : *part.adapters) {
      const LowRank& u = adapter->of(linear.number);
      if (u.r) kernels_.lora_down(x.f32 + m * x.f32_stride, x.f32_stride, n, K, u, h, ldh_);
      h += u.r;
    }
  }
}

// Adds the updates of a panel to its products.
void Engine::update(const Linear& linear, Rows rows, i64 panel, const Inputs& in, float* y, i64 ldy) {
  for (const Updated& part : *rows.updated) {
    const float* h = in.down.get() + part.first * ldh_;
    for (const auto& adapter : *part.adapters) {
      const LowRank& u = adapter->of(linear.number);
      if (u.r) kernels_.lora_up(h, ldh_, part.n, u, panel, y + part.first * ldy, ldy);
      h += u.r;
    }
  }
}

}  // namespace gptfast::engine
