// The low-rank updates of a pass: which rows have adapters, and what these add to the products of a matrix.
#include <algorithm>

#include "engine.h"

namespace gptfast::engine {

// Rows of sequences with the same adapters are updated together.
void Engine::note_adapters() {
  updated_.clear();
  updated_wanted_.clear();
  ldh_ = 0;
  const auto note = [](std::vector<Updated>& parts, i64 first, i64 n, const Adapters* adapters) {
    if (!n) return;
    auto part = std::find_if(parts.begin(), parts.end(), [&](const auto& p) { return *p.adapters == *adapters; });
    if (part == parts.end()) part = parts.insert(part, {{}, adapters});
    for (i64 m = first; m < first + n; m++) part->rows.push_back(m);
  };
  for (const Run& run : runs_) {
    if (run.adapters->empty()) continue;
    note(updated_, run.first, run.n, run.adapters);
    note(updated_wanted_, run.row, run.wanted, run.adapters);
  }
  for (const Updated& part : updated_) {
    i64 ranks = 0;
    for (const auto& adapter : *part.adapters) ranks += adapter->max_rank();
    ldh_ = std::max(ldh_, ranks);
  }
  down_.grow(M_ * ldh_);
}

bool Engine::has_updates(const Linear& linear, Rows rows) const {
  for (const Updated& part : *rows.updated)
    for (const auto& adapter : *part.adapters)
      if (adapter->of(linear.number).r) return true;
  return false;
}

// Until all rows of x are there for every thread, with x A^T of those that have adapters; those of one row one after another.
// Of a few rows each thread multiplies some ranks, so that each reads a part of A, and `multiply` waits for the others where
// it needs them; of more rows each multiplies those that it made.
void Engine::share_inputs(int t, const Linear& linear, const Activations& x, i64 K, Rows rows) {
  const bool few = rows.count < kUnpackedRows, updated = has_updates(linear, rows);
  if (rows.count > 1 && (few || !updated)) pool_.barrier(t);
  if (!updated) return;
  const Range mine = few ? Range{0, rows.count} : share(rows.count, t);
  for (const Updated& part : *rows.updated) {
    const auto begin = std::lower_bound(part.rows.begin(), part.rows.end(), mine.first);
    const auto end = std::lower_bound(begin, part.rows.end(), mine.last);
    float* h = down_.get();
    for (const auto& adapter : *part.adapters) {
      const LowRank& u = adapter->of(linear.number);
      const Range ranks = few ? share(u.r, t) : Range{0, u.r};
      if (begin < end && ranks.first < ranks.last)
        kernels_.lora_down(x.f32, x.f32_stride, &*begin, end - begin, K, u.ranks(ranks.first, ranks.last),
                           h + ranks.first, ldh_);
      h += u.r;
    }
  }
  if (few) pool_.arrive(t);
  else pool_.barrier(t);
}

// Adds the updates of some panels to their products.
void Engine::update(const Linear& linear, Rows rows, i64 panel, i64 count, float* y, i64 ldy) {
  for (const Updated& part : *rows.updated) {
    const float* h = down_.get();
    for (const auto& adapter : *part.adapters) {
      const LowRank& u = adapter->of(linear.number);
      if (u.r) kernels_.lora_up(h, ldh_, part.rows.data(), i64(part.rows.size()), u, panel, count, y, ldy);
      h += u.r;
    }
  }
}

}  // namespace gptfast::engine
