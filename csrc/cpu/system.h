// What differs between Linux, macOS and Windows: aligned and large memory, pages of zeros, processes that fork. No other
// file of the engine or the kernels includes a header of the system for these; csrc/python adds signals, of POSIX alone.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(_WIN32)
#include <malloc.h>
#include <process.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace gptfast::cpu {

// Memory for free_aligned. alignment: a power of two, at least that of a pointer. bytes: a multiple of it.
inline void* allocate_aligned(size_t alignment, size_t bytes) {
#if defined(_WIN32)
  void* memory = _aligned_malloc(bytes, alignment);
  if (!memory) throw std::bad_alloc();
#else
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes)) throw std::bad_alloc();
#endif
  return memory;
}
inline void free_aligned(void* memory) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  std::free(memory);
#endif
}

// Asks for large pages, where the system has such that nobody needs to set aside.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)  // Linux
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

// The number of this process; it changes where threads are gone because the process forked.
inline long process_id() {
#if defined(_WIN32)
  return 0;  // no fork
#else
  return long(getpid());
#endif
}

// Calls `before` ahead of each fork of this process, and `after` in both when it is done.
inline int at_fork([[maybe_unused]] void (*before)(), [[maybe_unused]] void (*after)()) {
#if defined(_WIN32)
  return 0;
#else
  return pthread_atfork(before, after, after);
#endif
}

#if !defined(_WIN32)
inline size_t page_size() { return size_t(sysconf(_SC_PAGESIZE)); }

// Zeros in the place of what is mapped at `page`; safe in a signal handler.
inline bool map_zeros(void* page, size_t bytes) {
#if defined(MAP_NORESERVE)
  constexpr int flags = MAP_PRIVATE | MAP_ANON | MAP_FIXED | MAP_NORESERVE;
#else
  constexpr int flags = MAP_PRIVATE | MAP_ANON | MAP_FIXED;
#endif
  return mmap(page, bytes, PROT_READ, flags, -1, 0) != MAP_FAILED;
}
#endif

}  // namespace gptfast::cpu
