// AMX's tile registers in C++, after the pseudo-code of Intel's manual (volume 2, LDTILECFG to TILEZERO), where csrc/cpu has its
// instructions else: the same kernels run, and what a processor would fault on ends the program with a message.
#pragma once
#include <cstdint>

#define GPTFAST_EMULATED_TILES

namespace gptfast::emulated {

void configure(const void* config);  // 64 bytes
void release();
void zero(int tile);
void load(int tile, const void* data, int64_t row_bytes);
void store(int tile, void* data, int64_t row_bytes);
void multiply_pairs(int c, int a, int b);         // tdpbf16ps
void multiply_signed_bytes(int c, int a, int b);  // tdpbssd

struct Counts {
  int64_t configured, loaded, stored, multiplied;
};
Counts counts();                   // of this thread, so far
Counts since(const Counts& then);  // the difference
bool in_use();                     // this thread has configured tiles and not released them

}  // namespace gptfast::emulated
