// The interface of racecheck.cpp, which is compiled without -fsanitize=thread. Offsets are into dynamic shared memory;
// `bar` is the shared address of an mbarrier.
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu {
namespace race {

extern thread_local int quiet;              // > 0: accesses belong to the emulator
enum Engine { kLoads = 40, kStores = 41 };  // of TMA
void reset(const char* smem, size_t bytes);
void current(int warp, int lane);
void barrier(uint32_t arrived_warps, const uint32_t* waiting);
void sync_warp(int w);
void access(int lane, size_t off, size_t n, bool write);  // generic proxy, current warp
void mb_release(uint32_t bar);
void mb_acquire(uint32_t bar);
void proxy_fence();
int tma_issue(Engine engine);                               // a copy starts: returns its number
void tma_done(int id, uint32_t bar, size_t off, size_t n);  // it wrote shared memory and completes on `bar`
void tma_read(int id, size_t off, size_t n);                // it read shared memory (a store or a reduction)
void tma_wait(int id);                                      // the current warp knows that it has read
int wg_issue(int g);                                        // a product starts: returns its number
void wg_read(int product, size_t off, size_t n);            // it reads shared memory, whenever it runs
void wg_commit(int g);                                      // a group ends
void wg_wait(int g, int left);  // the warps of g know that all groups but the last `left` have read

}  // namespace race
}  // namespace emu
