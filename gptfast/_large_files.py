"""Large files, written past the system's cache: that takes a tenth of the processor's time, which a training needs itself."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from gptfast._crc32 import copy_crc32

_BLOCK = 4 << 20  # bytes that are written at once; a multiple of what every disk asks for
_LEAST = 16 << 20  # bytes of a file from which on it pays
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux

Sums = dict[tuple[int, ...], str]
Pause = Callable[[float], object]
_sums: ContextVar[Sums | None] = ContextVar("sums", default=None)
_pause: ContextVar[Pause] = ContextVar("pause", default=lambda seconds: None)


@contextmanager
def paced(pause: Pause) -> Iterator[None]:
    """Inside, in this thread, `write_pieces` calls pause(seconds) after every 4 MB, with the processor's time that these took."""
    token = _pause.set(pause)
    try:
        yield
    finally:
        _pause.reset(token)


@contextmanager
def summed() -> Iterator[Sums]:
    """Collect the checksums of the files that `write_pieces` writes inside, in this thread."""
    found: Sums = {}
    token = _sums.set(found)
    try:
        yield found
    finally:
        _sums.reset(token)


def sum_of(path: Path, sums: Sums) -> str | None:
    """The checksum of a file, as `gptfast._files.checksum` has it, if `write_pieces` wrote it."""
    return sums.get(_identity(path.stat()))


def _identity(about: os.stat_result) -> tuple[int, ...]:
    """Tells a file from one that gets its inode after it was removed; a new name changes nothing."""
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def write_pieces(path: Path, pieces: Iterable[memoryview], size: int) -> None:
    """Write a new file.

    Args:
        path: of the file. One that is there is replaced, not emptied: the pieces may be a mapping of it.
        pieces: its content, bytes one after the other. size: bytes of all of them.
    Raises:
        OSError: it cannot be written (disk full, no permission).
    """
    if path.is_file():
        path.unlink()
    descriptor, direct = _open(path, size >= _LEAST)
    try:
        crc, block, pause = 0, memoryview(mmap.mmap(-1, _BLOCK)), _pause.get()  # the block begins where a page does
        start = time.thread_time()
        for length, sum_until_here in _filled(block, pieces):
            crc = sum_until_here
            if direct and length < _BLOCK:  # the end is no multiple of the disk's block
                direct = _through_the_cache(descriptor)
            direct = _write(descriptor, block[:length], direct)
            pause(time.thread_time() - start)
            start = time.thread_time()
        about, sums = os.fstat(descriptor), _sums.get()
        if sums is not None:
            sums[_identity(about)] = f"crc32:{crc:08x}"
    finally:
        os.close(descriptor)


def _open(path: Path, direct: bool) -> tuple[int, bool]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    if direct and _DIRECT:
        try:
            return os.open(path, flags | _DIRECT, 0o666), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that cannot
                raise
    return os.open(path, flags, 0o666), False


def _filled(block: memoryview, pieces: Iterable[memoryview]) -> Iterator[tuple[int, int]]:
    """Fill the block with the pieces' bytes again and again; yields how many it has, all of it but for the last time, and the
    CRC-32 of all until then."""
    at, crc = 0, 0
    for piece in pieces:
        begin = 0
        while begin < len(piece):
            n = min(len(piece) - begin, len(block) - at)
            crc = copy_crc32(block[at : at + n], piece[begin : begin + n], crc)
            at, begin = at + n, begin + n
            if at == len(block):
                yield at, crc
                at = 0
    if at:
        yield at, crc


def _write(descriptor: int, content: memoryview, direct: bool) -> bool:
    """Write all of it; returns whether the next block can be written past the cache."""
    while content:
        try:
            n = os.write(descriptor, content)
        except OSError as error:
            if not direct or error.errno != errno.EINVAL:  # a disk with larger blocks
                raise
            direct = _through_the_cache(descriptor)
            continue
        content = content[n:]
        if content and direct:  # what is left may begin anywhere
            direct = _through_the_cache(descriptor)
    return direct


def _through_the_cache(descriptor: int) -> bool:
    import fcntl  # where O_DIRECT is

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~_DIRECT)
    return False
