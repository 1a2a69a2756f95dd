// Assembles the engine's table of kernels for each instruction set that can run here.
#include <cstring>

#include "../cpu/isa_select.h"
#include "kernels.h"

#define DECLARE(kernel) void fill_##kernel(Kernels&);
#define DECLARE_ALL(isa)            \
  namespace cpu::isa_##isa {        \
    void fill_sample(Kernels&);     \
  }                                 \
  namespace engine::isa_##isa {     \
    GPTFAST_ENGINE_KERNELS(DECLARE) \
  }
namespace gptfast {
#if defined(__aarch64__)
DECLARE_ALL(scalar) DECLARE_ALL(neon) DECLARE_ALL(neon_bf16) namespace cpu::isa_neon_dotprod {
  using namespace isa_neon;
}
namespace engine::isa_neon_dotprod {
using namespace isa_neon;
GPTFAST_DOTPROD_KERNELS(DECLARE)
}
#else
GPTFAST_ISAS(DECLARE_ALL)
#endif
}

namespace gptfast::engine {
namespace {

struct Tables {
  Kernels table[4];
  int count = 0;
  Tables() {
#define FILL(kernel) from::fill_##kernel(k);
#define ADD(name)                         \
  if (cpu::can_run(#name)) {              \
    namespace from = isa_##name;          \
    Kernels& k = table[count++];          \
    k.isa = #name;                        \
    GPTFAST_ENGINE_KERNELS(FILL)          \
    cpu::Kernels shared;                  \
    cpu::isa_##name::fill_sample(shared); \
    k.sample = shared.sample;             \
  }
    GPTFAST_ISAS(ADD)
  }
};

}  // namespace

const Kernels* kernels(const char* isa) {
  static const Tables tables;
  for (int i = 0; i < tables.count; i++)
    if (!std::strcmp(isa, tables.table[i].isa)) return &tables.table[i];
  return nullptr;
}

}  // namespace gptfast::engine
