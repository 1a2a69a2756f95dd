// Assembles a table of kernels for each instruction set that can run here, and chooses one.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "isa_select.h"
#include "kernels.h"

namespace gptfast::cpu {

#define DECLARE(kernel) void fill_##kernel(Kernels&);
#define DECLARE_ALL(isa)         \
  namespace isa_##isa {          \
    GPTFAST_CPU_KERNELS(DECLARE) \
  }
#define DECLARE_PART(isa, base) \
  namespace isa_##isa {         \
    GPTFAST_CPU_##isa(DECLARE)  \
  }
GPTFAST_ISAS(DECLARE_ALL, DECLARE_PART)

namespace {

struct Available {
  Kernels tables[5] = {};
  const char* names[5];
  int count = 0;
  Available() {
#define FILL(kernel) from::fill_##kernel(k);
#define ADD(name)                   \
  if (can_run(#name)) {             \
    namespace from = isa_##name;    \
    Kernels& k = tables[count];     \
    k.isa = names[count++] = #name; \
    GPTFAST_CPU_KERNELS(FILL)       \
  }
#define ADD_PART(name, base)                   \
  if (can_run(#name)) {                        \
    namespace from = isa_##name;               \
    Kernels& k = tables[count] = *find(#base); \
    k.isa = names[count++] = #name;            \
    GPTFAST_CPU_##name(FILL)                   \
  }
    GPTFAST_ISAS(ADD, ADD_PART)
  }
  const Kernels* find(const char* name) const {
    for (int i = 0; i < count; i++)
      if (!std::strcmp(names[i], name)) return &tables[i];
    return nullptr;
  }
};

const Available& available() {
  static const Available a;
  return a;
}

const Kernels* default_table() {
  const char* wanted = std::getenv("GPTFAST_CPU_ISA");
  if (wanted && *wanted)
    if (const Kernels* k = available().find(wanted)) return k;
  return &available().tables[available().count - 1];
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> table{default_table()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

const char* const* available_isas(int* count) {
  *count = available().count;
  return available().names;
}

bool set_isa(const char* name) {
  const Kernels* k = name ? available().find(name) : default_table();
  if (!k) return false;
  current().store(k);
  return true;
}

const char* rejected_isa() {
  const char* wanted = std::getenv("GPTFAST_CPU_ISA");
  return wanted && *wanted && !available().find(wanted) ? wanted : nullptr;
}

}  // namespace gptfast::cpu
