"""Texts on disk instead of in memory, in an unnamed temporary file that is removed with its last user."""

from __future__ import annotations

import codecs
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptfast._files import remedy_of


class Spool:
    """A temporary file of texts, in TMPDIR (usually /tmp)."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gptfast-")  # noqa: SIM115 (closed with the last user)
        self._end, self._pending = 0, False

    def __del__(self) -> None:
        self._file.close()

    def add(self, blocks: Iterable[str]) -> Slice:
        """Append a text.

        Args:
            blocks: the text in blocks, which are written one by one.
        Raises:
            UnicodeEncodeError: a lone surrogate.
            OSError: the disk is full.
        """
        start = self._end
        for block in blocks:
            content = block.encode()
            try:
                self._file.write(content)
            except OSError as error:
                raise self._explained(error) from error
            self._pending = True
            self._end += len(content)
        return Slice(self, start, self._end - start)

    def read(self, start: int, size: int) -> bytes:
        if self._pending:
            try:
                self._file.flush()
            except OSError as error:
                raise self._explained(error) from error
            self._pending = False
        parts = []
        while size:  # one call reads 2 GB at most
            parts.append(os.pread(self._file.fileno(), size, start))
            start, size = start + len(parts[-1]), size - len(parts[-1])
        return b"".join(parts)

    def _explained(self, error: OSError) -> OSError:
        place = tempfile.gettempdir()
        return OSError(
            error.errno,
            f"cannot write texts to {place}: {error.strerror}; {remedy_of(error) or 'free some space'}, or set TMPDIR to another folder",
        )


class Held:
    """A text in memory, read as one in a spool."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, start: int, size: int) -> bytes:
        return self._content[start : start + size]


@dataclass(frozen=True, slots=True)
class Slice:
    """A text in a spool, or one in memory.

    start, size: in bytes of UTF-8.
    """

    spool: Spool | Held
    start: int
    size: int

    @property
    def content(self) -> bytes:
        return self.spool.read(self.start, self.size)

    def part(self, start: int, stop: int) -> Slice:
        """The bytes from start to stop, each the beginning of a character."""
        return Slice(self.spool, self.start + start, stop - start)

    def blocks(self, size: int) -> Iterator[str]:
        """The text in blocks of `size` bytes."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for at in range(0, self.size, size):
            text = decoder.decode(self.part(at, min(at + size, self.size)).content)
            if text:
                yield text
