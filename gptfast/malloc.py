"""An opt-in setting of glibc's malloc: keep large buffers instead of returning them to the kernel after each use."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from gptfast.backend import has_cpu_ops

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_LARGE = 1 << 20  # bytes
_KEEP = 2**31 - 1  # bytes: never returned
_TOP_PAD = 64  # MiB
# What `tune_malloc` sets, as the variables of the environment that glibc reads.
ENVIRONMENT = f"MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_={_KEEP} MALLOC_TOP_PAD_={_TOP_PAD << 20}"
_OTHERS = ("jemalloc", "tcmalloc", "mimalloc")  # allocators that keep large buffers by themselves
_tuned = False


def tune_malloc(top_pad_megabytes: int = _TOP_PAD) -> bool:
    """Keep freed memory in the process, so that a training step does not page in its buffers again each time.

    PyTorch's CPU allocator is malloc, and glibc maps every large buffer anew and unmaps it when freed: an op that
    returns 50 MB causes some 12,000 page faults, which often take longer than its arithmetic. This sets M_MMAP_MAX = 0,
    M_TRIM_THRESHOLD to its largest value and M_TOP_PAD (mallopt(3)). It speeds up all torch code of the process. The
    process keeps all memory that it has used once.

    Without it the ops of gptfast reuse up to 256 MB of their own freed results.

    If other programs use the same cores, also limit the spinning of OpenMP's threads, before torch is imported:
    `import gptfast.openmp; gptfast.openmp.bound_spinning()`, or GOMP_SPINCOUNT=10000 in the environment.

    Args:
        top_pad_megabytes: MiB to request from the kernel beyond what is needed, 0 to 2047.
    Returns:
        True if the C library accepted the settings; False if it is not glibc.
    Raises:
        ValueError: top_pad_megabytes is out of range.
    """
    if not 0 <= top_pad_megabytes < 2048:
        raise ValueError(f"tune_malloc: top_pad_megabytes is {top_pad_megabytes}; expected 0 to 2047")
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, top_pad_megabytes << 20))
    global _tuned
    _tuned = done = all([libc.mallopt(name, value) for name, value in settings])
    if done and has_cpu_ops:
        torch.ops.gptfast.keep_results(0)  # malloc keeps them now
    return done


def return_memory() -> bool:
    """Give large buffers back to the kernel when they are freed, and keep none: for a process that is to stay small.

    glibc alone raises the size from which it does so up to 32 MB as such buffers are freed, and buffers of many sizes that come
    and go leave holes: a training that divides its model among processes held twice what it used.

    Returns:
        True if the C library accepted the settings; False if it is not glibc.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):
        return False
    if has_cpu_ops:
        torch.ops.gptfast.keep_results(0)
    return all([libc.mallopt(name, _LARGE) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)])


class SteadyMemory:
    """Gives back to the kernel what glibc's malloc holds in holes, whenever a process that repeats its work has grown by much.

    Until glibc 2.38 a buffer that is freed often fits no request for an aligned one of its size, and PyTorch's are all aligned: the
    process grows with every step, by 3 MB in fine-tuning a small model. A process may grow by a quarter and 256 MiB before its
    holes are given back (malloc_trim(3), some milliseconds, and the page faults of one step).
    """

    def __init__(self, every: int = 16) -> None:
        """every: steps between two looks."""
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(libc, "malloc_trim", None)
        self._every, self._steps, self._most = every, 0, 0.0

    def after_step(self) -> bool:
        """Count a step, and look whether it is time; returns whether memory was given back."""
        self._steps += 1
        if self._trim is None or self._steps % self._every:
            return False
        held = _resident()
        grown = 0 < self._most < held
        if grown:
            self._trim(0)
            held = _resident()
        if grown or not self._most:
            self._most = 1.25 * held + (256 << 20)
        return grown


def _resident() -> int:
    """Bytes of memory that this process holds; Linux."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def keeps_memory() -> bool | None:
    """Whether large buffers stay in the process: by `tune_malloc`, by glibc's variables of the environment, or by another
    allocator in LD_PRELOAD. None: the C library is another one."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return None
    preloaded = os.environ.get("LD_PRELOAD", "")
    by_environment = os.environ.get("MALLOC_MMAP_MAX_") == "0" and "MALLOC_TRIM_THRESHOLD_" in os.environ
    return _tuned or by_environment or any(name in preloaded for name in _OTHERS)
