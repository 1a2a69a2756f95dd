// Sequences that an engine extends and cuts: their pages, and the passes that their tokens are divided into.
#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "engine.h"

namespace gptfast::engine {

Cache::Sizes Engine::cache_sizes() const {
  const Shape& s = model_.shape;
  i64 banded = 0;
  for (i64 l = 0; l < s.layers; l++) banded += s.window_of(l) > 0;
  return {(s.layers - banded) * layer_bytes_, banded * layer_bytes_, s.window};
}

void Engine::extend(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts, const int* tokens,
                    bool last_only, float* out, i64 ld) {
  const std::lock_guard guard(mutex_);
  cache.check_rows("extend", rows);
  for (size_t i = 0; i < rows.size(); i++) cache.check_room("extend", rows[i], counts[i]);
  extend_locked(cache, rows, counts, tokens, last_only, out, ld);
}

void Engine::prefix(Cache& cache, i64 row, const float* vectors, i64 n) {
  const std::lock_guard guard(mutex_);
  cache.check_live("prefix", row);
  if (cache.length(row) || n < 1 || n >= model_.shape.positions)
    throw std::invalid_argument("prefix: expected an empty slot and fewer vectors than block_size");
  reserve(cache, {row}, {n});
  for (i64 at = 0; at < n; at += kernels_.most_rows) {
    std::vector<Run> runs = {{0, std::min(n - at, kernels_.most_rows), at, 0, 0, cache.pages(row), &cache.adapters(row),
                              vectors + at * model_.shape.C}};
    slide(cache, {row}, runs, true);
    run_chunk(runs, nullptr, nullptr, 0);
  }
  cache.append(row, n, nullptr);
  cache.set_prefix(row);
  cache.settle();
}

void Engine::truncate(Cache& cache, i64 row, i64 length) {
  const std::lock_guard guard(mutex_);
  cache.check_live("truncate", row);
  if (length < 0 || length > cache.tokens(row))
    throw std::invalid_argument("truncate: length is " + std::to_string(length) + "; slot " + std::to_string(row) +
                                " holds " + std::to_string(cache.tokens(row)) + " positions");
  const std::vector<int> again = cache.to_reread(row, length);
  cache.truncate(row, again.empty() ? length : 0);
  if (!again.empty()) extend_locked(cache, {row}, {length}, again.data(), true, nullptr, 0);
}

// The first positions of one head of a page.
void Engine::copy_head(const Cache::Copy& copy, i64 layer, i64 head) const {
  const i64 size = element_size(cache_type_), D = model_.shape.D, begin = place_[size_t(layer)] * layer_bytes_;
  const i64 keys = begin + head * key_bytes_;
  const i64 values = begin + model_.shape.kv_heads * key_bytes_ + head * value_bytes_;
  for (i64 at = keys; at < keys + key_bytes_; at += kPage * size)
    std::memcpy(copy.to + at, copy.from + at, size_t(copy.positions * size));
  std::memcpy(copy.to + values, copy.from + values, size_t(copy.positions * padded_head(D) * size));
}
void Engine::copy_pages(const std::vector<Cache::Copy>& copies) {
  if (copies.empty()) return;
  pool_.run([&](int t) {
    const Range mine = share(model_.shape.kv_heads, t);
    for (const Cache::Copy& copy : copies)
      for (i64 layer = 0; layer < model_.shape.layers; layer++) {
        if ((model_.shape.window_of(layer) > 0) != copy.banded) continue;
        for (i64 head = mine.first; head < mine.last; head++) copy_head(copy, layer, head);
      }
  });
}

void Engine::reserve(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts) {
  std::vector<Cache::Copy> copies;
  try {
    for (size_t i = 0; i < rows.size(); i++) cache.reserve(rows[i], counts[i], copies);
  } catch (const std::bad_alloc&) {  // what has a page of its own already must not lose its past
    copy_pages(copies);
    cache.settle();
    throw;
  }
  copy_pages(copies);
}
// Pages of banded layers for a pass; rows: those of the runs.
void Engine::slide(Cache& cache, const std::vector<i64>& rows, std::vector<Run>& runs, bool keep) {
  std::vector<Cache::Copy> copies;
  for (size_t i = 0; i < rows.size(); i++) {
    cache.slide(rows[i], runs[i].start, runs[i].n, keep, copies);
    runs[i].banded = cache.banded(rows[i]);
  }
  copy_pages(copies);
}

// out: null where no logits are asked for.
void Engine::extend_locked(Cache& cache, const std::vector<i64>& rows, const std::vector<i64>& counts,
                           const int* tokens, bool last_only, float* out, i64 ld) {
  reserve(cache, rows, counts);
  std::vector<Run> runs;
  std::vector<i64> rows_of_runs;
  i64 M = 0, wanted = 0, written = 0, done = 0;
  auto flush = [&] {
    if (!M) return;
    slide(cache, rows_of_runs, runs, false);
    run_chunk(runs, tokens + done, out ? out + written * ld : nullptr, ld);
    written += std::exchange(wanted, 0);
    done += std::exchange(M, 0);
    runs.clear();
    rows_of_runs.clear();
  };
  for (size_t i = 0; i < rows.size(); i++)
    for (i64 at = 0; at < counts[i];) {
      const i64 n = std::min(counts[i] - at, kernels_.most_rows - M);
      const i64 logits = !out ? 0 : !last_only ? n : at + n == counts[i] ? 1 : 0;
      runs.push_back(
          {M, n, cache.length(rows[i]) + at, logits, wanted, cache.pages(rows[i]), &cache.adapters(rows[i]), nullptr});
      rows_of_runs.push_back(rows[i]);
      at += n;
      M += n;
      wanted += logits;
      if (M == kernels_.most_rows) flush();
    }
  flush();
  for (size_t i = 0; i < rows.size(); tokens += counts[i], i++) cache.append(rows[i], counts[i], tokens);
  cache.settle();
}

}  // namespace gptfast::engine
