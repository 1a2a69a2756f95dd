// AMX: whether there are tiles, and leave to use them, which Linux gives a process once it asks. It holds for all threads, those
// of before too, and for children of a fork; it is refused where a signal stack of the process has no room for the tiles.
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gptfast::cpu {

#if defined(__x86_64__) && defined(__linux__)
namespace {
bool ask() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned needed = 1u << 22 | 1u << 24 | 1u << 25;  // cpuid 7, edx: bf16, tiles, int8
  constexpr unsigned tile_state = 3u << 17;                    // XCR0
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & needed) != needed) return false;
  __get_cpuid(1, &a, &b, &c, &d);
  if (!(c & 1u << 27)) return false;  // osxsave
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & tile_state) != tile_state) return false;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
}  // namespace
bool amx_permitted() {
  static const bool permitted = ask();
  return permitted;
}
#else
bool amx_permitted() { return false; }
#endif

}  // namespace gptfast::cpu
