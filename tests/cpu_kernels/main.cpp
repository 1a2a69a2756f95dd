// Runs every kernel on every instruction set of this machine (or those named) against plain loops in double, and writes the
// engine's greedy tokens. It needs nothing but csrc/cpu and csrc/engine, and so runs where torch does not, under qemu too.
#include "check.h"

int main(int count, char** names) {
  using namespace gptfast;
  int available = 0;
  std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what was found before a crash
  const char* const* isas = cpu::available_isas(&available);
  if (count == 2 && !std::strcmp(names[1], "--list")) {
    for (int i = 0; i < available; i++) std::printf("%s\n", isas[i]);
    return 0;
  }
  for (int i = 0; i < available; i++) {
    bool wanted = count == 1;
    for (int n = 1; n < count; n++) wanted |= !std::strcmp(names[n], isas[i]);
    if (!wanted) continue;
    if (!cpu::set_isa(isas[i])) return 2;
    checks::totals = {};
    checks::check_rows();
    checks::check_norm();
    checks::check_gates();
    checks::check_loss();
    checks::check_products();
    checks::check_quantized();
    checks::check_attention();
    checks::check_sample();
    checks::check_engine(isas[i]);
    checks::check_tiles();
    const checks::Totals& t = checks::totals;
    std::printf("checked %s: %lld values in %lld checks, %lld failed\n", isas[i], (long long)t.values,
                (long long)t.checks, (long long)t.failures);
    if (t.failures) return 1;
    checks::print_tokens(isas[i]);
  }
  return 0;
}
