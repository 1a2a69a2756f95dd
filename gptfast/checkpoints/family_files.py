"""Weights of the architectures in `gptfast.checkpoints.families`, read and written under our names and in our shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.checkpoints.families import FAMILIES, IGNORED, Family, usual_name
from gptfast.checkpoints.mxfp4 import decoded
from gptfast.checkpoints.weight_files import StoredTensor, WeightFile
from gptfast.config import GPTConfig


class JoinedFile(WeightFile):
    """The weight files of a checkpoint as one, with our tensors of those that a network of this config has, and the others as
    they are.

    Args:
        path: of the checkpoint, for messages.
        files: of the checkpoint.
        kind: its model_type.
        config: what its config.json says.
        names: of the network's tensors.
    Raises:
        ValueError: parts of a tensor whose shapes or dtypes do not go together.
    """

    def __init__(
        self, path: Path, files: Sequence[WeightFile], kind: str, config: GPTConfig, names: Sequence[str]
    ) -> None:
        self._family, self._config = FAMILIES[kind], config
        there = {key: file for file in files for key in file.shapes if not IGNORED.search(key)}
        where = decoded({usual_name(kind, key): file.stored(key) for key, file in there.items()}, path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[StoredTensor]] = {}
        for name in names:
            keys = self._family.parts(name)
            if all(key in where for key in keys):
                found = [where.pop(key) for key in keys]
                self._check(path, name, keys, found)
                self._parts[name] = found
                self.shapes[name] = (sum(x.shape[0] for x in found), *found[0].shape[1:])
        self._others = set(where)
        self._parts |= {key: [x] for key, x in where.items()}
        self.shapes |= {key: x.shape for key, x in where.items()}

    def _check(self, path: Path, name: str, keys: Sequence[str], found: Sequence[StoredTensor]) -> None:
        rows = self._family.rows(name, self._config) or (None,)
        for key, x, count in zip(keys, found, rows, strict=True):
            expected = found[0].shape if count is None else (count, *found[0].shape[1:])
            if x.shape != expected or x.dtype != found[0].dtype:
                raise ValueError(
                    f"{path}: {key} has shape {x.shape} and dtype {x.dtype}; expected {expected} and {found[0].dtype} - use "
                    "the config.json and the weights of one checkpoint"
                )

    def stored(self, key: str) -> StoredTensor:
        parts = self._parts[key]
        read = partial(_read_joined, parts) if len(parts) > 1 else parts[0].read
        if key in self._others or self._family.is_plain(key):
            mxfp4 = parts[0].mxfp4 if len(parts) == 1 else None
            return StoredTensor(self.shapes[key], parts[0].dtype, read, mxfp4=mxfp4)
        return StoredTensor(self.shapes[key], parts[0].dtype, partial(self._read_moved, key, read))

    def _read_moved(self, name: str, read: Callable[..., Tensor], first: int = 0, last: int | None = None) -> Tensor:
        whole = self._family.from_file(name, read(), self._config)
        return whole if last is None else whole[first:last]


def _read_joined(parts: Sequence[StoredTensor], first: int = 0, last: int | None = None) -> Tensor:
    """Rows of tensors that follow one another."""
    rows = sum(part.shape[0] for part in parts)
    last = rows if last is None else min(last, rows)
    found, start = [], 0
    for part in parts:
        low, high = max(first - start, 0), min(last - start, part.shape[0])
        if low < high:
            found.append(part.read(low, high))
        start += part.shape[0]
    return torch.cat(found) if found else parts[0].read(0, 0)


class Source(NamedTuple):
    """Where a tensor of a file comes from. name: of ours. form: what of that lies in the file, as it lies there."""

    name: str
    form: Callable[[Tensor], Tensor]


def sources(kind: str, config: GPTConfig, names: Sequence[str]) -> Iterator[tuple[str, Source]]:
    """The tensors of a file by name, of our tensors of these names."""
    family: Family = FAMILIES[kind]
    for name in names:
        for n, key in enumerate(family.parts(name)):
            source = Source(name, partial(_form, family, name, config, n))
            yield key, source
            if not config.tie_weights:
                yield from ((copy, source) for copy, of in family.copies.items() if of == key)


def _form(family: Family, name: str, config: GPTConfig, part: int, x: Tensor) -> Tensor:
    return family.to_file(name, x, config, part)
