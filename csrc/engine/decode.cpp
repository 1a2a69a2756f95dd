// Drawing tokens inside the engine.
#include <algorithm>
#include <utility>

#include "engine.h"

namespace gptfast::engine {

void Engine::decode(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& streams,
                    const Sampling& sampling, i64 steps, bool more, float* logits, i64 ld,
                    std::vector<std::vector<int>>& tokens) {
  const std::lock_guard guard(mutex_);
  const auto& ends = sampling.end_tokens;
  std::vector<size_t> active(rows.size());
  for (size_t i = 0; i < rows.size(); i++) active[i] = i;
  tokens.assign(rows.size(), {});
  for (i64 step = 0; step < steps && !active.empty(); step++) {
    std::vector<i64> active_rows, active_streams;
    for (size_t i : active) active_rows.push_back(rows[i]), active_streams.push_back(streams[i]);
    const std::vector<i64> drawn = sample(cache, active_rows, active_streams, sampling, logits, ld);
    std::vector<size_t> left;
    std::vector<i64> left_rows;
    std::vector<int> left_tokens;
    bool broken = false;
    for (size_t i = 0; i < active.size(); i++) {
      tokens[active[i]].push_back(int(drawn[i]));
      broken |= drawn[i] < 0;
      if (std::find(ends.begin(), ends.end(), drawn[i]) != ends.end()) continue;
      left.push_back(active[i]);
      left_rows.push_back(active_rows[i]);
      left_tokens.push_back(int(drawn[i]));
    }
    if (broken) return;
    active = std::move(left);
    if (active.empty() || (step == steps - 1 && !more)) return;
    extend_locked(cache, left_rows, std::vector<i64>(left_rows.size(), 1), left_tokens.data(), true, logits, ld);
  }
}

std::vector<i64> Engine::sample(const Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& streams,
                                const Sampling& sampling, const float* logits, i64 ld) {
  const i64 n = i64(rows.size());
  std::vector<i64> positions, drawn(rows.size());
  for (i64 row : rows) positions.push_back(cache.length(row));
  const cpu::SampleParams p{
      {logits, ld, cpu::DType::f32}, positions.data(), streams.data(), drawn.data(), model_.shape.V, sampling.top_k,
      sampling.temperature,          sampling.top_p,   sampling.seed};
  if (n == 1) {
    kernels_.sample(p, 0, 1);
  } else {
    pool_.run([&](int t) {
      const Range mine = share(n, t);
      if (mine.first < mine.last) kernels_.sample(p, mine.first, mine.last);
    });
  }
  return drawn;
}

}  // namespace gptfast::engine
