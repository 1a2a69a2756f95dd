"""Documents: named texts that are read on demand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptfast._files import text_blocks
from gptfast.data.spool import Slice
from gptfast.tokenizer.pieces import BLOCK, blocks_of


@dataclass(frozen=True, slots=True)
class Document:
    """A named text. The text of a file is read on demand, so that neither a document nor a corpus must fit in memory.

    name: unique in a corpus.
    source: the text, the path of its file, or its slice of a spool.
    start, stop: of a part of a file: the range of its bytes; stop None: to the end.
    """

    name: str
    source: str | Path | Slice
    start: int = 0
    stop: int | None = None

    @property
    def text(self) -> str:
        """The text. Raises OSError or ValueError for a file that is missing, empty, binary or not UTF-8."""
        return "".join(self.blocks())

    def blocks(self, size: int = BLOCK) -> Iterator[str]:
        """The text in blocks of about `size` characters, read one by one. Raises as `text`."""
        if isinstance(self.source, str):
            return blocks_of(self.source, size)
        if isinstance(self.source, Slice):
            return self.source.blocks(size)
        return text_blocks(self.source, self.start, self.stop, size)

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        if isinstance(self.source, str):
            return len(self.source.encode())
        if isinstance(self.source, Slice):
            return self.source.size
        return (self.source.stat().st_size if self.stop is None else self.stop) - self.start
