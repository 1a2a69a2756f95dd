"""Files that are mapped into memory while other programs may cut them short or write over them."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from typing import Any, BinaryIO


class MappedFile(mmap.mmap):
    """A whole file, mapped read-only, that knows when it is no longer the file that was opened.

    Replacing the file by another one (a rename, as `atomic_write` does) hurts nobody: the mapping keeps the old one.
    Cutting it short or writing over it in place does. Reading behind a new end is SIGBUS, of which the kernel says nothing
    but the signal's number; where gptfast is compiled, one of two things happens instead (`recover`).

    `memoryview(mapped)` and `numpy.frombuffer(mapped, ...)` keep the mapping, and with it its guard, alive.

    Args:
        file: open for reading, not empty; it may be closed afterwards.
        path: for messages.
        recover: True: the reader sees zeros, and the next `check` raises: for readers that call `check` after reading,
            before they trust what they got. False: a line on stderr names the file, then the signal ends the process:
            for arrays that are handed out.
    Raises:
        OSError: the file cannot be mapped.  ValueError: it is empty.
    """

    path: str
    _descriptor: _Descriptor
    _state: tuple[int, int]
    _guard: Any

    def __new__(cls, file: BinaryIO, path: str | os.PathLike[str], *, recover: bool) -> MappedFile:
        mapped = super().__new__(cls, file.fileno(), 0, access=mmap.ACCESS_READ)
        mapped.path = os.fspath(path)
        mapped._descriptor = _Descriptor(file.fileno())
        mapped._state = mapped._descriptor.state()
        mapped._guard = _guard(mapped, recover)
        return mapped

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()

    def close(self) -> None:
        """Unmap the file; as `mmap.mmap.close`."""
        super().close()
        self._guard = None  # the addresses may now belong to something else

    def changed(self) -> bool:
        """Whether the file's size or time of change is another one than when it was mapped (about a microsecond).

        A new time alone may be harmless (`touch`): whoever has a checksum can compare it and then call `accept`.
        """
        return self._descriptor.state() != self._state or self._failed()

    def accept(self, same: Callable[[], bool] | None = None) -> bool:
        """Take the file as it is now for unchanged; whether it was taken. Only one of the old size can be.

        same: looks whether the content is still the old one.
        """
        state = self._descriptor.state()
        if state[0] != self._state[0] or (same is not None and not same()) or self._failed():
            return False
        self._state = state
        return True

    def check(self) -> None:
        """Raise where the file was changed since it was mapped, or could not be read.

        Raises:
            OSError: it was; the text names the file.
        """
        if self.changed():
            error = OSError(
                errno.EIO,
                "the file was changed, cut short or could not be read while it is in use; open it again, and replace such "
                "files by renaming a new one over them",
                self.path,
            )
            error.explained = True  # type: ignore[attr-defined] (see gptfast._files)
            raise error

    def _failed(self) -> bool:
        return self._guard is not None and self._guard.failed


class _Descriptor:
    """A file descriptor of its own, closed with this object."""

    _number = -1

    def __init__(self, number: int) -> None:
        self._number = os.dup(number)

    def state(self) -> tuple[int, int]:
        """Size and time of the last change."""
        status = os.fstat(self._number)
        return status.st_size, status.st_mtime_ns

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the end of the interpreter os is gone
        if self._number >= 0:
            close(self._number)


def _guard(mapped: MappedFile, recover: bool) -> Any:
    """What watches for SIGBUS; None without the compiled part."""
    try:
        from gptfast import _C
    except ImportError:
        return None
    return _C.MappingGuard(mapped, mapped.path, recover)
