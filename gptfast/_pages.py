"""Pages of this process that need not be resident."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

_MADV_DONTNEED = 4  # of madvise(2)
_LEAST = 1 << 20  # bytes of a mapping that is worth it
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+\s*(.*)")


class _Mapping(NamedTuple):
    """A mapping of /proc/self/smaps. own: KB of it that are not the file's any more."""

    first: int
    last: int
    access: str
    path: str
    own: int


def drop_code() -> None:
    """Let the system take back the pages of libraries' code; what runs again is mapped again from the page cache.

    `import torch` leaves 60 to 70 MB of such pages, most of which ran once. Only mappings of which every page is still the file's
    are dropped: a debugger's breakpoint is a page of its own. Without Linux's smaps nothing is done.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for m in list(_mappings()):
            if m.access == "r-xp" and m.path.startswith("/") and m.own == 0 and m.last - m.first >= _LEAST:
                madvise(m.first, m.last - m.first, _MADV_DONTNEED)  # a refusal is harmless


def _mappings() -> Iterator[_Mapping]:
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
        head, own = None, 0
        for line in file:
            if found := _HEAD.match(line):
                if head is not None:
                    yield _Mapping(int(head[1], 16), int(head[2], 16), head[3], head[4], own)
                head, own = found, 0
            elif line.startswith("Anonymous:"):
                own += int(line.split()[1])
        if head is not None:
            yield _Mapping(int(head[1], 16), int(head[2], 16), head[3], head[4], own)
