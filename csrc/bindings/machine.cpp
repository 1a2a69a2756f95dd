// What the machine can do, measured: the figures beside which every time is printed.
#include <chrono>
#include <thread>

#include "common.h"

namespace gptfast {
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Nobody can interrupt the loop: it ends within a minute.
void check_rounds(const char* op, i64 rounds) {
  constexpr i64 kMost = 100'000'000;
  GPTFAST_CHECK(rounds >= 1 && rounds <= kMost, op, ": ", rounds, " rounds; expected 1 to ", kMost);
}

// Flop/s of all threads at once, fp32 or (pairs) bf16 products with fp32 sums.
double peak_flops(i64 iterations, bool pairs) {
  check_rounds("peak_flops", iterations);
  const i64 threads = torch::stable::get_num_threads();
  std::vector<double> flops(threads);
  std::vector<float> sinks(threads * 16);
  const double start = seconds();
  torch::stable::parallel_for(0, threads, 1, [&](i64 begin, i64 end) {
    for (i64 t = begin; t < end; t++) flops[t] = cpu::kernels().peak_flops(iterations, pairs, &sinks[t * 16]);
  });
  const double elapsed = seconds() - start;
  double total = 0;
  for (double f : flops) total += f;
  return total / elapsed;
}

// Nanoseconds that a signal between two threads takes: it tells in which of its states a shared machine is.
double signal_ns(i64 rounds) {
  check_rounds("signal_ns", rounds);
  std::atomic<i64> ball{0};
  std::thread other([&] {
    for (i64 n = 0; n < rounds; n++) {
      while (ball.load(std::memory_order_acquire) != 2 * n + 1) {
      }
      ball.store(2 * n + 2, std::memory_order_release);
    }
  });
  const double start = seconds();
  for (i64 n = 0; n < rounds; n++) {
    ball.store(2 * n + 1, std::memory_order_release);
    while (ball.load(std::memory_order_acquire) != 2 * n + 2) {
    }
  }
  const double elapsed = seconds() - start;
  other.join();
  return elapsed / double(rounds) / 2 * 1e9;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) {
  m.impl("peak_flops", GPTFAST_BOX(&peak_flops));
  m.impl("signal_ns", GPTFAST_BOX(&signal_ns));
}

}  // namespace gptfast
