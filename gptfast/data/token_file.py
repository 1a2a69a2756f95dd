"""Token files, mapped into memory; `gptfast.data.token_format` describes their bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gptfast._files import atomic_write, open_read
from gptfast._mapping import MappedFile
from gptfast.data.token_format import CONTINUES, MAGIC, SIZE, UNKNOWN, check_size, find_damage, read_header, read_tail
from gptfast.data.token_writer import Ids, TokenWriter


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Tokens of one or more documents, mapped read-only into memory.

    tokens: (N,) uint16 or uint32.
    eos_id: the token that ends each document, or None.
    document_starts: (documents,) int64, positions in `tokens`.
    checksums: CRC-32 of each block of tokens; None for a part of a file.
    vocabulary: the hash of the vocabulary, see `gptfast.data.token_format`; zeros: not known.
    continues: the first token continues a document of the shard before, see `gptfast.data.TokenShards`.

    Replacing the file by another one (a rename) does not change these tokens. If the file is changed in place or cut short,
    `take` raises an error; reading `tokens` beyond the new end ends the process with a line that names the file.
    """

    path: Path
    tokens: np.ndarray
    vocab_size: int
    eos_id: int | None
    document_starts: np.ndarray
    checksums: np.ndarray | None
    vocabulary: bytes
    continues: bool
    _source: Any = field(repr=False)
    _first: int = 0  # position of these tokens in the file

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, None if self.checksums is not None else (self._first, len(self)))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TokenFile:
        """Map a file that `write_tokens` wrote.

        Raises:
            OSError: missing or unreadable.
            ValueError: not a token file, of another version, cut short, or with a damaged header.
        """
        path = Path(path)
        with open_read(path) as file:
            header = read_header(path, file.read(SIZE))
            check_size(path, os.fstat(file.fileno()).st_size, header)
            end = header.size + header.tokens * header.itemsize
            file.seek(end)
            starts, checksums = read_tail(path, header, file.read(header.tail))
            mapped, handed_out = (MappedFile(file, path, recover=recover) for recover in (True, False))
            trusted, tokens = (
                np.frombuffer(m, np.uint8)[header.size : end].view(header.dtype) for m in (mapped, handed_out)
            )
        continues = bool(header.flags & CONTINUES)
        if continues:
            starts = np.concatenate([np.zeros(1, np.int64), starts[starts > 0]])
        return cls(
            path,
            tokens,
            header.vocab_size,
            None if header.eos_id < 0 else header.eos_id,
            starts,
            checksums,
            header.vocabulary,
            continues,
            _Source(mapped, trusted, checksums, header.block),
        )

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at `places`, an array of positions.

        Raises:
            OSError: the file was changed or cut short after it was opened.
        """
        return self._source.take(places + self._first)

    def verify(self) -> None:
        """Compare all tokens with the checksums in the file.

        Raises:
            ValueError: they do not match, or this is a part of a file.
        """
        if self.checksums is None:
            raise ValueError(f"TokenFile.verify: this is a part of {self.path}; verify TokenFile.open(path)")
        damage = find_damage(self.tokens, self.checksums, self._source.block)
        if damage:
            raise ValueError(f"{self.path}: {damage}; the file is damaged - prepare the data again")

    def split(self, val_fraction: float = 0.1) -> tuple[TokenFile, TokenFile]:
        """Views of the first and the last documents, for training and validation.

        Args:
            val_fraction: part of the tokens for validation, in (0, 1). The cut is at the nearest document boundary, or
                exactly there if no boundary is within a factor of two.
        """
        if not 0 < val_fraction < 1:
            raise ValueError(f"TokenFile.split: val_fraction is {val_fraction}; expected a number in (0, 1)")
        count = len(self.tokens)
        wanted = count - max(1, round(count * val_fraction))
        cut = int(self.document_starts[np.abs(self.document_starts - wanted).argmin()])
        if not (count - wanted) / 2 <= count - cut <= min(2 * (count - wanted), count - 1):
            cut = wanted
        return self._view(0, cut), self._view(cut, count)

    def _view(self, start: int, stop: int) -> TokenFile:
        inside = self.document_starts[(self.document_starts > start) & (self.document_starts < stop)] - start
        starts = np.concatenate([np.zeros(1, np.int64), inside])
        first = self._first + start
        return replace(self, tokens=self.tokens[start:stop], document_starts=starts, checksums=None, _first=first)


class _Source:
    """The tokens of a mapped file, checked against its checksums when the file changes."""

    def __init__(self, mapped: MappedFile, tokens: np.ndarray, checksums: np.ndarray, block: int) -> None:
        self._mapped, self._tokens, self._checksums, self.block = mapped, tokens, checksums, block

    def take(self, places: np.ndarray) -> np.ndarray:
        taken = self._tokens[places]
        if self._mapped.changed() and not self._mapped.accept(self._is_intact):
            self._mapped.check()
        return taken

    def _is_intact(self) -> bool:
        return not find_damage(self._tokens, self._checksums, self.block)


def _reopen(path: Path, part: tuple[int, int] | None) -> TokenFile:
    """Open a file again, for pickle in another process."""
    file = TokenFile.open(path)
    return file if part is None else file._view(part[0], part[0] + part[1])


def is_token_file(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a file that begins with the magic bytes of token files."""
    path = Path(path)
    if not path.is_file():
        return False
    with open_read(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def write_tokens(
    path: str | os.PathLike[str],
    documents: Iterable[Ids | Iterator[Ids]],
    vocab_size: int,
    eos_id: int | None = None,
    vocabulary: bytes = UNKNOWN,
) -> TokenFile:
    """Write a token file atomically.

    Args:
        path: the file to write or replace.
        documents: the ids of each document: a sequence, or an iterator over pieces of it, so that a document need not fit
            in memory. Empty documents are left out.
        vocab_size: ids are in [0, vocab_size). Up to 65536 an id takes two bytes, else four.
        eos_id: a token to append to each document that does not end with it; None: no token.
        vocabulary: its hash, of `gptfast.data.token_format.vocabulary_hash`; zeros: not known.
    Returns:
        The file, opened.
    Raises:
        TypeError: a document is not a list of integers.
        ValueError: an id outside the vocabulary, or no tokens at all.
        OSError: the file cannot be written; a previous file is intact.
    """
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"write_tokens: vocab_size is {vocab_size}; expected 1 <= vocab_size <= 2**32")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"write_tokens: eos_id is {eos_id}; expected None or 0 <= eos_id < {vocab_size}")
    atomic_write(path, lambda file: TokenWriter(file, vocab_size, eos_id, vocabulary).write(documents))
    return TokenFile.open(path)
