"""The first reading of a corpus: which documents are kept, which are for validation, and a hash of it all.

Of each document a few numbers are kept, some 25 bytes; its text is read again when it is encoded.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain, groupby
from operator import itemgetter

import numpy as np

from gptfast.data.corpus import Corpus
from gptfast.data.documents import Document
from gptfast.data.encode import batches_of
from gptfast.data.filters import Filters
from gptfast.data.near_duplicates import NearDuplicates
from gptfast.data.split import check_fraction, choice_note, choose, divide, ends_note, split_key
from gptfast.data.workers import Workers

_NAMED = 1000  # documents up to which a note names those for validation


@dataclass
class Survey:
    """What the first reading of a corpus of n documents found.

    keep: (n,) bool, whether a document is kept. val: (n,) bool, those for validation; None: the last `val_fraction` of each is.
    order: the numbers of the documents for validation in the order in which they are written; None: that of the corpus.
    size, val_size: bytes of text that is kept, and of the part of it for validation. digest: of the names and texts that are
    kept, and of the split. split: a sentence on it. notes: sentences on what the filters left out.
    """

    corpus: Corpus
    keep: np.ndarray
    val: np.ndarray | None
    order: list[int] | None
    val_fraction: float
    size: int
    val_size: int
    digest: str
    split: str
    notes: list[str] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[str, Document]]:
        """("train" or "val", document) of all that is kept.

        Raises:
            OSError, ValueError: a document cannot be read, or the corpus is another one than before.
        """
        late: dict[int, Document] = {}  # for validation, in an order of their own
        n = -1
        for n, (_, document) in enumerate(self.corpus.stream()):
            if n >= len(self.keep):
                break
            if not self.keep[n]:
                continue
            if self.val is None:
                yield from zip(("train", "val"), divide(document, self.val_fraction), strict=True)
            elif self.val[n] and self.order is not None:
                late[n] = document
            else:
                yield "val" if self.val[n] else "train", document
        if n != len(self.keep) - 1:
            raise ValueError(f"prepare: {self.corpus.data} was changed while it was read; run prepare again")
        for n in self.order or ():
            yield "val", late[n]

    def training(self) -> Iterator[Document]:
        """The documents of the training part."""
        return (document for part, document in self.parts() if part == "train")


def survey(
    corpus: Corpus,
    val_fraction: float,
    seed: int,
    filters: Filters,
    workers: Workers | None = None,
    advance: Callable[[int], None] = lambda size: None,
) -> Survey:
    """Read a corpus from its first document to its last.

    Args:
        corpus: what to read.
        val_fraction, seed: as in `split_documents`; val_fraction counts where the corpus is not split itself.
        filters: what to leave out.
        workers: make the signatures of near-duplicates; needed for these alone.
        advance: gets the bytes of each document.
    Raises:
        OSError, ImportError, ValueError: a document cannot be read, or none is left.
    """
    check_fraction(val_fraction)
    reader = _Reader(corpus, seed, filters, advance)
    near = None
    if filters.drop_near_duplicates and workers is not None:
        near = _near_duplicates(reader, workers)
    else:
        deque(reader.pieces(), maxlen=0)
    keep = np.array(reader.fits, bool)
    notes = []
    if (dropped := len(keep) - int(keep.sum())) > 0:
        notes.append(f"{dropped:,} of {len(keep):,} documents left out for their length")
    if near is not None:
        kept = np.flatnonzero(keep)
        keep[kept[near]] = False
        notes.append(f"{int(near.sum()):,} of {len(kept):,} documents left out as near-duplicates of an earlier one")
    if not keep.any():
        raise ValueError(f"prepare: no document of {corpus.data} is left: {'; '.join(notes)}")
    return _divided(reader, keep, val_fraction, notes)


class _Reader:
    """Reads the documents of a corpus once, and keeps a few numbers of each.

    fits: whether the filters keep its length. held: whether the corpus says that it is for validation. keys: its place in the
    order of the split. sizes: bytes. hashes: 16 bytes, of name and text. names: of the first documents.
    """

    def __init__(self, corpus: Corpus, seed: int, filters: Filters, advance: Callable[[int], None]) -> None:
        self.corpus, self._seed, self._filters, self._advance = corpus, seed, filters, advance
        self.fits, self.held = bytearray(), bytearray()
        self.keys, self.sizes, self.hashes = array("Q"), array("q"), bytearray()
        self.names: list[str] = []

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(number of the document, a block of its text). No document is empty.

        What is kept of a document is known when the first block of the next one comes.
        """
        for n, (held, document) in enumerate(self.corpus.stream()):
            characters, digest = 0, hashlib.sha256(repr(document.name).encode() + b"\n")
            for block in document.blocks():
                characters += len(block)
                digest.update(block.encode())
                yield n, block
            self.fits.append(self._filters.keeps(characters))
            self.held.append(held)
            self.keys.append(split_key(self._seed, document.name))
            self.sizes.append(document.size)
            self.hashes += digest.digest()[:16]
            if n < _NAMED:
                self.names.append(document.name)
            self._advance(document.size)


def _near_duplicates(reader: _Reader, workers: Workers) -> np.ndarray:
    """Of the documents whose length fits: whether each is a near-duplicate of an earlier one."""
    found = NearDuplicates()
    batches = workers.map("signatures", batches_of(reader.pieces(), lambda piece: len(piece[-1])))
    for n, signatures in groupby(chain.from_iterable(batches), key=itemgetter(0)):
        of_document = reduce(np.minimum, (of_piece for _, of_piece in signatures))
        if reader.fits[n]:  # known, as all of the document is read
            found.add(of_document)
    return found.found()


def _divided(reader: _Reader, keep: np.ndarray, val_fraction: float, notes: list[str]) -> Survey:
    corpus, kept = reader.corpus, np.flatnonzero(keep)
    sizes = np.array(reader.sizes, np.int64)
    order: list[int] | None = None
    if corpus.is_split:
        val = np.array(reader.held, bool) & keep
        if not val.any() or val.sum() == len(kept):
            empty = "train" if val.any() else "validation"
            raise ValueError(f"prepare: no document of the {empty} split of {corpus.data} is left: {'; '.join(notes)}")
        note = f"validation: the split that {corpus.data} has for it, {val.sum():,} of {len(kept):,} documents"
    else:
        chosen = choose(np.array(reader.keys, np.uint64)[kept], sizes[kept], val_fraction)
        if chosen is None:
            val, note = None, ends_note(len(kept), val_fraction)
        else:
            val = np.zeros(len(keep), bool)
            val[kept[chosen]] = True
            share = sizes[val].sum() / sizes[kept].sum()
            named = len(keep) <= _NAMED
            names = [reader.names[n] for n in kept[chosen[:7]].tolist()] if named else []
            note = choice_note(len(chosen), len(kept), share, names)
            if corpus.is_cheap_to_keep:
                order = kept[chosen].tolist()
    digest = hashlib.sha256(np.frombuffer(reader.hashes, np.uint8).reshape(-1, 16)[kept].tobytes())
    digest.update(repr(val_fraction).encode() if val is None else np.packbits(val).tobytes())
    size = int(sizes[kept].sum())
    val_size = round(size * val_fraction) if val is None else int(sizes[val].sum())
    return Survey(corpus, keep, val, order, val_fraction, size, val_size, digest.hexdigest(), note, notes)
