// Drawing tokens inside the engine.
#include <algorithm>
#include <atomic>
#include <utility>

#include "engine.h"

namespace gptfast::engine {

void Engine::decode(Cache& cache, const std::vector<i64>& rows, const std::vector<Sampling>& samplings,
                    const std::vector<i64>& ends, i64 steps, std::atomic<bool>& interrupted, float* logits, i64 ld,
                    std::vector<std::vector<int>>& tokens) {
  const std::lock_guard guard(mutex_);
  cache.check_rows("decode_steps", rows);
  for (i64 row : rows) cache.check_room("decode_steps", row, steps - 1);
  std::vector<size_t> active(rows.size());
  for (size_t i = 0; i < rows.size(); i++) active[i] = i;
  tokens.assign(rows.size(), {});
  for (i64 step = 0; step < steps && !active.empty(); step++) {
    std::vector<i64> positions;
    std::vector<Sampling> wanted;
    for (size_t i : active) positions.push_back(cache.tokens(rows[i])), wanted.push_back(samplings[i]);
    const std::vector<i64> drawn = draw_locked(wanted, positions, logits, ld);
    std::vector<size_t> left;
    std::vector<i64> left_rows;
    std::vector<int> left_tokens;
    bool broken = false;
    for (size_t i = 0; i < active.size(); i++) {
      tokens[active[i]].push_back(int(drawn[i]));
      broken |= drawn[i] < 0;
      if (std::find(ends.begin(), ends.end(), drawn[i]) != ends.end()) continue;
      left.push_back(active[i]);
      left_rows.push_back(rows[active[i]]);
      left_tokens.push_back(int(drawn[i]));
    }
    if (broken) return;
    active = std::move(left);
    if (active.empty() || step == steps - 1 || interrupted.exchange(false)) return;
    extend_locked(cache, left_rows, std::vector<i64>(left_rows.size(), 1), left_tokens.data(), true, logits, ld);
  }
}

std::vector<i64> Engine::draw(const std::vector<Sampling>& samplings, const std::vector<i64>& positions,
                              const float* logits, i64 ld) {
  const std::lock_guard guard(mutex_);
  return draw_locked(samplings, positions, logits, ld);
}

// Threads take one row after another: the cost of a draw depends on its sampling parameters.
std::vector<i64> Engine::draw_locked(const std::vector<Sampling>& samplings, const std::vector<i64>& positions,
                                     const float* logits, i64 ld) {
  std::vector<i64> drawn(samplings.size());
  std::atomic<size_t> next{0};
  const auto job = [&](int) {
    for (size_t r; (r = next++) < samplings.size();) {
      const Sampling& s = samplings[r];
      const SampleParams p{
          .logits = {logits + i64(r) * ld, ld, DType::f32},
          .position = &positions[r],
          .stream = &s.stream,
          .each = nullptr,
          .out = &drawn[r],
          .R = 1,
          .V = s.vocab > 0 ? std::min(s.vocab, model_.shape.V) : model_.shape.V,
          .all = {s.temperature, s.top_k, s.top_p, s.seed},
      };
      kernels_.sample(p, 0, 1);
    }
  };
  if (samplings.size() == 1) job(0);
  else pool_.run(job);
  return drawn;
}

}  // namespace gptfast::engine
