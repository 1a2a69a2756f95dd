"""Token files: ids as uint16 or uint32 after a small header, memory-mapped.

    byte 0   8   magic "gptftok\\n"
         8   4   version of the format, 1
        12   4   bytes per token, 2 or 4
        16   8   vocab_size
        24   8   eos_id, the token after each document, or -1
        32   8   number of tokens
        40   8   number of documents
        48   4   CRC-32 of the tokens
        52   8   zero
        60   4   CRC-32 of bytes 0 to 59
        64       the tokens, then for each document the position of its first token (8 bytes each)

All numbers are little-endian.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gptfast._files import atomic_write, open_read
from gptfast._mapping import MappedFile

MAGIC = b"gptftok\n"
VERSION = 1
_HEADER = struct.Struct("<8sIIQqQQI8x")
_CRC = struct.Struct("<I")
_HEADER_SIZE = _HEADER.size + _CRC.size
_VERIFY_CHUNK = 1 << 24

Ids = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Tokens of one or more documents, mapped read-only into memory.

    tokens: (N,) uint16 or uint32.
    eos_id: the token that ends each document, or None.
    document_starts: (documents,) int64, positions in `tokens`.
    checksum: CRC-32 of the tokens; None for a part of a file.

    Replacing the file by another one (a rename) does not change these tokens. If the file is changed in place or cut short,
    `take` raises an error; reading `tokens` beyond the new end ends the process with a line that names the file.
    """

    path: Path
    tokens: np.ndarray
    vocab_size: int
    eos_id: int | None
    document_starts: np.ndarray
    checksum: int | None
    _source: _Source = field(repr=False)
    _first: int = 0  # position of these tokens in the file

    def __reduce__(self) -> tuple:
        return _reopen, (self.path, None if self.checksum is not None else (self._first, len(self)))

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
            header = _read_header(path, file.read(_HEADER_SIZE))
            itemsize, vocab_size, eos_id, count, documents, checksum = header
            end = _HEADER_SIZE + count * itemsize
            _check_size(path, os.fstat(file.fileno()).st_size, end + documents * 8)
            file.seek(end)
            starts = np.frombuffer(file.read(documents * 8), "<i8")
            dtype, size = np.dtype(f"<u{itemsize}"), count * itemsize
            source = _Source(MappedFile(file, path, recover=True), dtype, size, checksum)
            tokens = np.frombuffer(MappedFile(file, path, recover=False), np.uint8)[_HEADER_SIZE : _HEADER_SIZE + size]
        if starts[0] != 0 or starts[-1] >= count or (np.diff(starts) <= 0).any():
            raise ValueError(f"{path}: the list of documents is damaged; prepare the data again")
        eos = None if eos_id < 0 else eos_id
        return cls(path, tokens.view(dtype), vocab_size, eos, starts, checksum, source)

    def take(self, places: np.ndarray) -> np.ndarray:
        """The tokens at `places`, an array of positions.

        Raises:
            OSError: the file was changed or cut short after it was opened.
        """
        return self._source.take(places + self._first)

    def verify(self) -> None:
        """Compare all tokens with the checksum in the header.

        Raises:
            ValueError: they do not match, or this is a part of a file.
        """
        if self.checksum is None:
            raise ValueError(f"TokenFile.verify: this is a part of {self.path}; verify TokenFile.open(path)")
        crc = _crc(self.tokens)
        if crc != self.checksum:
            raise ValueError(
                f"{self.path}: the tokens have checksum 0x{crc:08x}, expected 0x{self.checksum:08x}; "
                "the file is damaged - prepare the data again"
            )

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
        return replace(self, tokens=self.tokens[start:stop], document_starts=starts, checksum=None, _first=first)


class _Source:
    """The tokens of a mapped file, checked against its header when the file changes."""

    def __init__(self, mapped: MappedFile, dtype: np.dtype, size: int, checksum: int) -> None:
        self._mapped, self._checksum = mapped, checksum
        self._tokens = np.frombuffer(mapped, np.uint8)[_HEADER_SIZE : _HEADER_SIZE + size].view(dtype)

    def take(self, places: np.ndarray) -> np.ndarray:
        taken = self._tokens[places]
        if self._mapped.changed() and not self._mapped.accept(lambda: _crc(self._tokens) == self._checksum):
            self._mapped.check()
        return taken


def _reopen(path: Path, part: tuple[int, int] | None) -> TokenFile:
    """Open a file again, for pickle in another process."""
    file = TokenFile.open(path)
    return file if part is None else file._view(part[0], part[0] + part[1])


def _crc(tokens: np.ndarray) -> int:
    crc = 0
    for start in range(0, len(tokens), _VERIFY_CHUNK):
        crc = zlib.crc32(tokens[start : start + _VERIFY_CHUNK].data, crc)
    return crc


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
) -> TokenFile:
    """Write a token file atomically.

    Args:
        path: the file to write or replace.
        documents: the ids of each document: a sequence, or an iterator over pieces of it, so that a document need not fit
            in memory. Empty documents are left out.
        vocab_size: ids are in [0, vocab_size). Up to 65536 an id takes two bytes, else four.
        eos_id: a token to append to each document; None: no token.
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
    atomic_write(path, lambda file: TokenWriter(file, vocab_size, eos_id).write(documents))
    return TokenFile.open(path)


class TokenWriter:
    """Writes the token format to an open file; for the arguments see `write_tokens`."""

    def __init__(self, file: BinaryIO, vocab_size: int, eos_id: int | None) -> None:
        self.file, self.vocab_size, self.eos_id = file, vocab_size, eos_id
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self.count, self.crc = 0, 0
        self.starts: list[int] = []

    def write(self, documents: Iterable[Ids | Iterator[Ids]]) -> None:
        """Write all documents and the header. Afterwards `count` is the number of tokens."""
        self.file.seek(_HEADER_SIZE)
        for document in documents:
            start = self.count
            for piece in document if isinstance(document, Iterator) else (document,):
                self._add(np.asarray(piece))
            if self.count > start:
                self.starts.append(start)
                if self.eos_id is not None:
                    self._add(np.asarray([self.eos_id]))
        if not self.count:
            raise ValueError("write_tokens: documents have no token; expected at least one")
        self.file.write(np.asarray(self.starts, "<i8").data)
        self.file.seek(0)
        self.file.write(self._header())

    def _add(self, ids: np.ndarray) -> None:
        if ids.ndim == 1 and not ids.size:
            return
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TypeError(
                f"write_tokens: document {len(self.starts)} is of {ids.dtype} with shape {ids.shape}; "
                "expected a list of integers, or a one-dimensional integer array"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"write_tokens: document {len(self.starts)} has id {low if low < 0 else high}; expected "
                f"ids in [0, {self.vocab_size}) - was another tokenizer used?"
            )
        tokens = np.ascontiguousarray(ids, self.dtype)
        self.crc = zlib.crc32(tokens.data, self.crc)
        self.count += len(tokens)
        self.file.write(tokens.data)

    def _header(self) -> bytes:
        eos_id = -1 if self.eos_id is None else self.eos_id
        sizes = (self.dtype.itemsize, self.vocab_size, eos_id, self.count, len(self.starts), self.crc)
        header = _HEADER.pack(MAGIC, VERSION, *sizes)
        return header + _CRC.pack(zlib.crc32(header))


def _read_header(path: Path, header: bytes) -> tuple[int, int, int, int, int, int]:
    if header[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"{path} is not a gptfast token file (it begins with {header[:8]!r}, expected {MAGIC!r}); make "
            "one with `gptfast prepare`, or from raw uint16 ids (nanoGPT's train.bin) with "
            "gptfast.data.write_tokens(path, [numpy.fromfile(old, 'uint16')], vocab_size)"
        )
    if len(header) < _HEADER_SIZE:
        raise ValueError(f"{path} is cut short: {len(header)} bytes, less than the header of {_HEADER_SIZE}")
    _, version, *sizes = _HEADER.unpack_from(header)
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, expected {VERSION}; prepare the data again")
    if _CRC.unpack_from(header, _HEADER.size)[0] != zlib.crc32(header[: _HEADER.size]):
        raise ValueError(f"{path}: the header does not match its checksum; prepare the data again")
    itemsize, vocab_size, eos_id, count, documents, _ = sizes
    known = itemsize in (2, 4) and 1 <= vocab_size <= 2 ** (8 * itemsize) and -1 <= eos_id < vocab_size
    if not known or not 1 <= documents <= count:
        raise ValueError(
            f"{path}: the header contradicts itself ({itemsize} bytes per token, a vocabulary of {vocab_size}, end of text "
            f"{eos_id}, {count} tokens, {documents} documents); prepare the data again"
        )
    return tuple(sizes)


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        state = "cut short" if size < expected else "longer than it should be"
        raise ValueError(
            f"{path} is {state}: {size} bytes, expected {expected}; copy it again, or prepare the data again"
        )
