"""CRC-32 at the speed of memory where the compiled part and the CPU have it, else zlib's; the same numbers."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

_LEAST = 4096  # bytes from which the compiled part is worth its call


@cache
def _compiled() -> Any:
    try:
        from gptfast import _C
    except ImportError:
        return None
    has_fast = getattr(_C, "has_fast_crc32", None)  # None: not compiled again since these are there
    return _C if has_fast is not None and has_fast() else None


def crc32(content: memoryview, crc: int = 0) -> int:
    """As `zlib.crc32`."""
    fast = _compiled() if len(content) >= _LEAST else None
    return zlib.crc32(content, crc) if fast is None else fast.crc32(content, crc)


def copy_crc32(target: memoryview, content: memoryview, crc: int = 0) -> int:
    """Copy bytes to as many others, in one read with their `crc32`, which is returned."""
    fast = _compiled() if len(content) >= _LEAST else None
    if fast is not None:
        return fast.copy_crc32(target, content, crc)
    target[:] = content
    return zlib.crc32(content, crc)
