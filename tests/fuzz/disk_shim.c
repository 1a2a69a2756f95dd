// Disk faults on demand: loaded with LD_PRELOAD, it counts the calls that change files below a path, and from the n-th on
// something goes wrong. disk_faults.py arms it in the child process that saves.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum Mode { kCount, kEioOnce, kEio, kEnospc, kHalfThenEnospc, kKill, kHalfThenKill };

static char g_prefix[PATH_MAX];
static long g_nth = -1, g_count = 0;
static int g_mode = kCount;

void shim_arm(const char* prefix, long nth, int mode) {
  snprintf(g_prefix, sizeof g_prefix, "%s", prefix);
  g_nth = nth, g_mode = mode, g_count = 0;
}

long shim_count(void) { return g_count; }

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_below(const char* path) {
  size_t n = strlen(g_prefix);
  return n && !strncmp(path, g_prefix, n) && (path[n] == '/' || !path[n]);
}

static int fd_is_below(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return is_below(path);
}

static int at_is_below(int fd, const char* path) {
  if (!g_prefix[0] || !path) return 0;
  if (path[0] == '/') return is_below(path);
  char folder[PATH_MAX];
  if (fd != AT_FDCWD) return fd_is_below(fd);
  return getcwd(folder, sizeof folder) && is_below(folder);
}

// What becomes of the call: 0 it goes on, an errno it fails with, or -1 half of it is written.
static int fate(int writes, int frees) {
  if (g_mode == kCount) return g_count++, 0;
  long now = ++g_count;
  if (now < g_nth) return 0;
  if (g_mode == kKill || (g_mode == kHalfThenKill && !(writes && now == g_nth))) {
    raise(SIGKILL);
  }
  if (g_mode == kEioOnce) return now == g_nth ? EIO : 0;
  if (g_mode == kEio) return EIO;
  if (now == g_nth && writes && (g_mode == kHalfThenEnospc || g_mode == kHalfThenKill)) return -1;
  return frees ? 0 : ENOSPC;  // a full disk lets files be removed
}

#define FAIL_IF(below, frees)        \
  if (below) {                       \
    int error = fate(0, frees);      \
    if (error) return errno = error, -1; \
  }

#define WRITES(below, length, call_all, call_half)  \
  if (below) {                                      \
    int error = fate(1, 0);                         \
    if (error > 0) return errno = error, -1;        \
    if (error < 0) {                                \
      ssize_t half = (length) / 2;                  \
      if (!half) return errno = ENOSPC, -1;         \
      return call_half;                             \
    }                                               \
  }                                                 \
  return call_all;

ssize_t write(int fd, const void* data, size_t n) {
  WRITES(fd_is_below(fd), n, NEXT(write)(fd, data, n), NEXT(write)(fd, data, half))
}
ssize_t pwrite(int fd, const void* data, size_t n, off_t at) {
  WRITES(fd_is_below(fd), n, NEXT(pwrite)(fd, data, n, at), NEXT(pwrite)(fd, data, half, at))
}
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) { return pwrite(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec* parts, int n) {
  WRITES(fd_is_below(fd), (ssize_t)parts[0].iov_len, NEXT(writev)(fd, parts, n), NEXT(write)(fd, parts[0].iov_base, half))
}
ssize_t sendfile(int out, int in, off_t* at, size_t n) {
  WRITES(fd_is_below(out), n, NEXT(sendfile)(out, in, at, n), NEXT(sendfile)(out, in, at, half))
}
ssize_t sendfile64(int out, int in, off64_t* at, size_t n) { return sendfile(out, in, at, n); }
ssize_t copy_file_range(int in, off64_t* i, int out, off64_t* o, size_t n, unsigned flags) {
  WRITES(fd_is_below(out), n, NEXT(copy_file_range)(in, i, out, o, n, flags),
         NEXT(copy_file_range)(in, i, out, o, half, flags))
}

int fsync(int fd) { FAIL_IF(fd_is_below(fd), 0) return NEXT(fsync)(fd); }
int fdatasync(int fd) { FAIL_IF(fd_is_below(fd), 0) return NEXT(fdatasync)(fd); }
int ftruncate(int fd, off_t n) { FAIL_IF(fd_is_below(fd), 1) return NEXT(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { FAIL_IF(fd_is_below(fd), 1) return NEXT(ftruncate64)(fd, n); }

int renameat2(int from, const char* old, int to, const char* new, unsigned flags) {
  FAIL_IF(at_is_below(to, new) || at_is_below(from, old), 0)
  return NEXT(renameat2)(from, old, to, new, flags);
}
int renameat(int from, const char* old, int to, const char* new) {
  FAIL_IF(at_is_below(to, new) || at_is_below(from, old), 0)
  return NEXT(renameat)(from, old, to, new);
}
int rename(const char* old, const char* new) {
  FAIL_IF(at_is_below(AT_FDCWD, new) || at_is_below(AT_FDCWD, old), 0)
  return NEXT(rename)(old, new);
}
int link(const char* old, const char* new) { FAIL_IF(at_is_below(AT_FDCWD, new), 0) return NEXT(link)(old, new); }
int linkat(int from, const char* old, int to, const char* new, int flags) {
  FAIL_IF(at_is_below(to, new), 0)
  return NEXT(linkat)(from, old, to, new, flags);
}
int unlink(const char* path) { FAIL_IF(at_is_below(AT_FDCWD, path), 1) return NEXT(unlink)(path); }
int unlinkat(int fd, const char* path, int flags) {
  FAIL_IF(at_is_below(fd, path), 1)
  return NEXT(unlinkat)(fd, path, flags);
}
int rmdir(const char* path) { FAIL_IF(at_is_below(AT_FDCWD, path), 1) return NEXT(rmdir)(path); }
int mkdir(const char* path, mode_t mode) { FAIL_IF(at_is_below(AT_FDCWD, path), 0) return NEXT(mkdir)(path, mode); }
int mkdirat(int fd, const char* path, mode_t mode) {
  FAIL_IF(at_is_below(fd, path), 0)
  return NEXT(mkdirat)(fd, path, mode);
}

#define OPENS(fd, call)                                             \
  va_list rest;                                                     \
  va_start(rest, flags);                                            \
  mode_t mode = (flags & (O_CREAT | __O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
  va_end(rest);                                                     \
  FAIL_IF((flags & (O_CREAT | O_WRONLY | O_RDWR)) && at_is_below(fd, path), 0) \
  return call;

int open(const char* path, int flags, ...) { OPENS(AT_FDCWD, NEXT(open)(path, flags, mode)) }
int open64(const char* path, int flags, ...) { OPENS(AT_FDCWD, NEXT(open64)(path, flags, mode)) }
int openat(int fd, const char* path, int flags, ...) { OPENS(fd, NEXT(openat)(fd, path, flags, mode)) }
int openat64(int fd, const char* path, int flags, ...) { OPENS(fd, NEXT(openat64)(fd, path, flags, mode)) }
