"""Pages of this process that need not be resident."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import suppress

_MADV_DONTNEED = 4  # of madvise(2)
_LEAST = 1 << 20  # bytes of a mapping that is worth it
_PRESENT_OR_SWAPPED, _OF_A_FILE = 0xC0, 0x20  # in the highest byte of a page's eight in /proc/self/pagemap


def drop_code() -> None:
    """Let the system take back the pages of libraries' code; what runs again is mapped again from the page cache.

    `import torch` leaves 60 to 70 MB of such pages, most of which ran once. Only mappings of which every page is still the file's
    are dropped: a debugger's breakpoint is a page of its own. Without Linux's pagemap nothing is done.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError), open("/proc/self/pagemap", "rb", buffering=0) as pages:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for first, last in list(_code()):
            if last - first >= _LEAST and not _has_own_pages(pages.fileno(), first, last):
                madvise(first, last - first, _MADV_DONTNEED)  # a refusal is harmless


def _code() -> Iterator[tuple[int, int]]:
    """First byte of each mapping of a file's code, and the one past its last. /proc/self/smaps would tell of own pages too, and takes
    some 40 us for each of all mappings."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            if " r-xp " in line and line.find("/") > 0:
                first, last = line.split(maxsplit=1)[0].split("-")
                yield int(first, 16), int(last, 16)


def _has_own_pages(pagemap: int, first: int, last: int) -> bool:
    """Is any page there not the file's any more, but a copy that was written to?"""
    told = os.pread(pagemap, (last - first) // mmap.PAGESIZE * 8, first // mmap.PAGESIZE * 8)
    highest = set(told[7::8] if sys.byteorder == "little" else told[::8])
    return any(kind & _PRESENT_OR_SWAPPED and not kind & _OF_A_FILE for kind in highest)
