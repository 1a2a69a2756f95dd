"""Writing token files: one after another, as their tokens come."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from gptfast.data.token_format import BLOCK, CONTINUES, SIZE, UNKNOWN, Header

Ids = Sequence[int] | np.ndarray


class TokenWriter:
    """Writes the token format to an open file; for the arguments see `gptfast.data.write_tokens`.

    count: tokens so far. starts: positions of the documents' first tokens. crcs: checksums of the blocks so far, the last
    of which may not be full.

    Args:
        continues: the first token continues a document of the shard before.
    """

    def __init__(
        self,
        file: BinaryIO,
        vocab_size: int,
        eos_id: int | None,
        vocabulary: bytes = UNKNOWN,
        continues: bool = False,
    ) -> None:
        self.file, self.vocab_size, self.eos_id, self.vocabulary = file, vocab_size, eos_id, vocabulary
        self.dtype = np.dtype("<u2" if vocab_size <= 65536 else "<u4")
        self.count, self.continues = 0, continues
        self.starts, self.crcs = array("q"), array("L")
        file.seek(SIZE)

    def write(self, documents: Iterable[Ids | Iterator[Ids]]) -> None:
        """Write all documents, without those that have no token, and the header."""
        for document in documents:
            start, last = self.count, None
            for piece in document if isinstance(document, Iterator) else (document,):
                ids = self.checked(piece)
                if len(ids) and self.count == start:
                    self.starts.append(start)
                self.add(ids)
                last = ids[-1] if len(ids) else last
            if self.count > start and self.eos_id is not None and last != self.eos_id:
                self.add(self.checked([self.eos_id]))
        if not self.count:
            raise ValueError("write_tokens: documents have no token; expected at least one")
        self.finish()

    def checked(self, piece: Ids) -> np.ndarray:
        """Ids in the dtype of the file.

        Raises:
            TypeError: not a list of integers.  ValueError: an id outside the vocabulary.
        """
        ids = np.asarray(piece)
        if ids.ndim == 1 and not ids.size:
            return np.empty(0, self.dtype)
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
        return np.ascontiguousarray(ids, self.dtype)

    def add(self, tokens: np.ndarray) -> None:
        """Write tokens that are `checked`."""
        at = 0
        while at < len(tokens):
            inside = self.count % BLOCK
            part = tokens[at : at + BLOCK - inside]
            before = self.crcs.pop() if inside else 0
            self.crcs.append(zlib.crc32(part.data, before))
            self.file.write(part.data)
            self.count += len(part)
            at += len(part)

    def finish(self) -> None:
        """Write the list of documents, the checksums and the header."""
        tail = np.asarray(self.starts, "<i8").tobytes() + np.asarray(self.crcs, "<u4").tobytes()
        self.file.write(tail)
        eos_id = -1 if self.eos_id is None else self.eos_id
        numbers = (self.dtype.itemsize, self.vocab_size, eos_id, self.count, len(self.starts), zlib.crc32(tail))
        flags = CONTINUES if self.continues else 0
        self.file.seek(0)
        self.file.write(Header(*numbers, flags=flags, vocabulary=self.vocabulary).packed())
