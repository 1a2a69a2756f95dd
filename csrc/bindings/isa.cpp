// Which instruction set the CPU kernels use. The table lives in this library, so the questions about it do too.
#include "common.h"

namespace gptfast {
namespace {

std::string cpu_isa() { return cpu::kernels().isa; }
std::string cpu_isas() {  // comma-separated, worst first
  int count = 0;
  const char* const* names = cpu::available_isas(&count);
  std::string all;
  for (int i = 0; i < count; i++) {
    if (i) all += ',';
    all += names[i];
  }
  return all;
}
std::string cpu_rejected_isa() { return cpu::rejected_isa() ? cpu::rejected_isa() : ""; }
bool set_cpu_isa(std::string name) { return cpu::set_isa(name.empty() ? nullptr : name.c_str()); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gptfast, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", GPTFAST_BOX(&cpu_isa));
  m.impl("cpu_isas", GPTFAST_BOX(&cpu_isas));
  m.impl("cpu_rejected_isa", GPTFAST_BOX(&cpu_rejected_isa));
  m.impl("set_cpu_isa", GPTFAST_BOX(&set_cpu_isa));
}

}  // namespace gptfast
