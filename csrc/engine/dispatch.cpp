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
#define DECLARE_PART(isa, base)   \
  namespace engine::isa_##isa {   \
    GPTFAST_ENGINE_##isa(DECLARE) \
  }
namespace gptfast {
GPTFAST_ISAS(DECLARE_ALL, DECLARE_PART)
}

namespace gptfast::engine {
namespace {

struct Tables {
  Kernels table[5];
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
#define ADD_PART(name, base)                  \
  if (cpu::can_run(#name)) {                  \
    namespace from = isa_##name;              \
    Kernels& k = table[count] = *find(#base); \
    count++;                                  \
    k.isa = #name;                            \
    GPTFAST_ENGINE_##name(FILL)               \
  }
    GPTFAST_ISAS(ADD, ADD_PART)
  }
  const Kernels* find(const char* isa) const {
    for (int i = 0; i < count; i++)
      if (!std::strcmp(isa, table[i].isa)) return &table[i];
    return nullptr;
  }
};

}  // namespace

const Kernels* kernels(const char* isa) {
  static const Tables tables;
  return tables.find(isa);
}

}  // namespace gptfast::engine
