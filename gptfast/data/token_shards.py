"""Tokens in several files, used as those of one: train-00001-of-00003.bin and so on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from gptfast.data.token_file import TokenFile


class TokenShards(TokenFile):
    """The shards of `gptfast prepare` as one `TokenFile`; `path` is that of the first. `tokens` has the elements of their
    tokens one after another, without a copy: indices, slices, lengths and `numpy.asarray` (which copies) are those of an array."""

    @classmethod
    def join(cls, files: Sequence[TokenFile]) -> TokenFile:
        """Files in their order; of one the file itself.

        Raises:
            ValueError: they have different vocabularies, or one does not continue the one before.
        """
        first, *others = files
        for file in others:
            if (file.vocab_size, file.eos_id, file.vocabulary) != (first.vocab_size, first.eos_id, first.vocabulary):
                raise ValueError(
                    f"{file.path} has another vocabulary than {first.path}; both cannot be shards of one text - prepare the data again"
                )
        if not others:
            return first
        offsets = np.cumsum([0, *map(len, files)])
        starts = [
            file.document_starts[1 if file.continues else 0 :] + offset
            for file, offset in zip(files, offsets[:-1].tolist(), strict=True)
        ]
        if first.continues:
            raise ValueError(f"{first.path} continues a shard that is missing; prepare the data again")
        source = _Sources(files, offsets)
        joined = JoinedArray([file.tokens for file in files])
        same = (first.vocab_size, first.eos_id, np.concatenate(starts), None, first.vocabulary, False)
        return cls(first.path, joined, *same, source)  # type: ignore[arg-type]

    def __reduce__(self) -> tuple:
        paths = [file.path for file in self._source.files]
        whole = self._first == 0 and len(self) == int(self._source.offsets[-1])
        return _rejoin, (paths, None if whole else (self._first, len(self)))

    def verify(self) -> None:
        """Compare the tokens of every shard with its checksums; see `TokenFile.verify`."""
        for file in self._source.files:
            file.verify()


class JoinedArray(NDArrayOperatorsMixin):
    """Arrays of one dtype, one after another, read like one array (N,). Operators, numpy's functions and other methods of an array
    take a copy of all."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = [part for part in parts if len(part)] or list(parts[:1])
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.dtype, self.ndim = parts[0].dtype, 1

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int]:
        return (len(self),)

    @property
    def size(self) -> int:
        return len(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("tokens of several files are no single array; a copy is needed")
        return np.concatenate(self._parts).astype(dtype or self.dtype, copy=False)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*(np.asarray(x) if isinstance(x, JoinedArray) else x for x in inputs), **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            begins = self._ends - [len(part) for part in self._parts]
            found = [
                part[max(0, start - b) : max(0, stop - b)] for part, b in zip(self._parts, begins.tolist(), strict=True)
            ]
            found = [part for part in found if len(part)]
            return found[0] if len(found) == 1 else JoinedArray(found or [self._parts[0][:0]])
        places = np.asarray(index)
        if places.dtype == bool:
            places = np.flatnonzero(places)
        places = np.where(places < 0, places + len(self), places)
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"index {index} is out of bounds for {len(self)} tokens")
        return _take(places, self._ends, [part.__getitem__ for part in self._parts], self.dtype)

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self._parts)


class _Sources:
    """The checked tokens of several files."""

    def __init__(self, files: Sequence[TokenFile], offsets: np.ndarray) -> None:
        self.files, self.offsets = list(files), offsets

    def take(self, places: np.ndarray) -> np.ndarray:
        return _take(places, self.offsets[1:], [file.take for file in self.files], self.files[0].tokens.dtype)


def _take(places: np.ndarray, ends: np.ndarray, takes: Sequence[Any], dtype: np.dtype) -> Any:
    """The elements at places of arrays that lie one after another and end at `ends`."""
    owner = np.searchsorted(ends, places, side="right")
    found = np.empty(places.shape, dtype)
    for n in np.unique(owner).tolist():
        here = owner == n
        found[here] = takes[n](places[here] - (ends[n - 1] if n else 0))
    return found[()]


def _rejoin(paths: Sequence[Path], part: tuple[int, int] | None) -> TokenFile:
    file = TokenShards.join([TokenFile.open(path) for path in paths])
    return file if part is None else file._view(part[0], part[0] + part[1])
