"""Near-duplicates by MinHash and locality-sensitive hashing (Broder, SEQUENCES 1997; Indyk and Motwani, STOC 1998).

The parameters are those of FineWeb (Penedo et al., arXiv 2406.17557, section 3.4): shingles of 5 words, 14 bands of 8 hashes.
Two documents with a part s of their shingles in common have an equal band with probability 1 - (1 - s^8)^14: 5% at s = 0.5,
77% at 0.75, 99.96% at 0.9. Documents that are linked by equal bands form a cluster, of which the first is kept.

Words are runs of letters and digits without regard to case; each ideograph, kana or Hangul syllable is a word. Everything is
a function of the text alone: no order, process or random generator enters.
"""

from __future__ import annotations

import tempfile
from functools import cache

import numpy as np

from gptfast.data.splitmix import GAMMA, finalised

WORDS, BANDS, ROWS = 5, 14, 8  # of a shingle; of a signature; of a band
_AT_ONCE = 1024  # shingles: their hashes stay in the processor's cache
_BASE, _INVERSE = GAMMA, pow(GAMMA, -1, 2**64)  # any odd number
_ASCII = np.array([chr(n).isalnum() for n in range(128)])


def signature(text: str) -> np.ndarray:
    """(112,) uint64: of each hash function the least value over the shingles of a text. That of several pieces of a document
    is the least of theirs."""
    shingles = _shingles(text)
    least = np.full(BANDS * ROWS, 2**64 - 1, np.uint64)
    for start in range(0, len(shingles), _AT_ONCE):
        hashes = shingles[start : start + _AT_ONCE, None] * _multipliers()
        np.minimum(least, hashes.min(axis=0), out=least)
    return least


def _shingles(text: str) -> np.ndarray:
    """Hashes of every 5 words in a row, or of all words where there are fewer."""
    words = _words(text.lower().encode("utf-8", "surrogatepass"))
    count = min(WORDS, len(words))
    hashes = np.zeros(max(1, len(words) - count + 1), np.uint64)
    for n in range(count):
        hashes = _mix(hashes ^ words[n : n + len(hashes)])
    return hashes if count else _mix(hashes)


def _words(content: bytes) -> np.ndarray:
    """The hash of each word: a polynomial of its bytes modulo 2^64, by differences of running sums."""
    byte = np.frombuffer(content, np.uint8)
    inside = np.concatenate([[False], np.where(byte < 128, _ASCII[np.minimum(byte, 127)], True), [False]])
    alone = np.concatenate([[False], (byte >= 0xE3) & (byte <= 0xED), [False]])  # begins a character of East Asia
    starts = np.flatnonzero(inside[1:] & (~inside[:-1] | alone[1:]))
    ends = np.flatnonzero(inside[:-1] & (~inside[1:] | alone[1:]))
    powers, inverses = _powers(1 << max(12, len(byte).bit_length()))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((byte + np.uint64(1)) * powers[: len(byte)])])
    return _mix((sums[ends] - sums[starts]) * inverses[starts])


@cache
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The powers of the base of the polynomials, and their inverses, modulo 2^64."""
    found = []
    for base in (_BASE, _INVERSE):
        factors = np.full(count, base, np.uint64)
        factors[0] = 1
        found.append(np.cumprod(factors))
    return found[0], found[1]


@cache
def _multipliers() -> np.ndarray:
    """One odd number for each hash function: to multiply mixed hashes by it permutes them."""
    return _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)) | np.uint64(1)


def _mix(x: np.ndarray) -> np.ndarray:
    return finalised(x + np.uint64(GAMMA))


class NearDuplicates:
    """Collects the signatures of documents, on disk, 112 bytes each; memory is needed to find the clusters, some 40 bytes a
    document.

    Documents are numbered from 0 in the order in which they are added.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="gptfast-")  # noqa: SIM115 (closed with this object)
        self._count = 0

    def __del__(self) -> None:
        self._file.close()

    def add(self, signature: np.ndarray) -> None:
        """The next document, (112,) uint64."""
        bands = np.zeros(BANDS, np.uint64)
        for row in signature.reshape(BANDS, ROWS).T:
            bands = _mix(bands ^ row)
        self._file.write(bands.tobytes())
        self._count += 1

    def found(self) -> np.ndarray:
        """(documents,) bool: those that are linked to an earlier document."""
        self._file.flush()
        if not self._count:
            return np.zeros(0, bool)
        bands = np.memmap(self._file, np.uint64, "r", shape=(self._count, BANDS))
        links = [_groups(np.ascontiguousarray(bands[:, k])) for k in range(BANDS)]
        first = np.arange(self._count)
        before = None
        while before is None or (first != before).any():
            before = first.copy()
            for members, starts in links:
                if len(members):
                    least = np.minimum.reduceat(first[members], starts)
                    first[members] = np.repeat(least, np.diff([*starts.tolist(), len(members)]))
        return first != np.arange(self._count)


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of values that occur more than once, group by group, and where each group begins."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = ordered[1:] == ordered[:-1]
    member = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    begins = np.concatenate([[True], ~same])
    return order[member], np.flatnonzero(begins[member])
