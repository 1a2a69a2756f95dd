"""The weight files of a checkpoint folder: safetensors, or the older .bin, of which nothing but tensors is read."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptfast._files import open_read
from gptfast._json import field, items, read_json
from gptfast._mapping import MappedFile
from gptfast._snapshots import current
from gptfast.checkpoints.pickled import check_tensors, read_pickled

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_SINGLE, OLD_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_KINDS = ((SINGLE, INDEX), (OLD_SINGLE, OLD_INDEX))  # the first that is there counts


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a weight file, which is read when it is asked for.

    read: `read()` gives the tensor, `read(first, last)` rows [first, last) of its first dimension.
    mapped: gives its bytes in the file, a view of a `MappedFile`; None: it does not lie in one as it is.
    mxfp4: the blocks and the scales that `read` decodes, see `gptfast.checkpoints.mxfp4`; None: it does not.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[..., Tensor]
    mapped: Callable[[], memoryview] | None = None
    mxfp4: tuple[StoredTensor, StoredTensor] | None = None

    @classmethod
    def of(cls, x: Tensor) -> StoredTensor:
        """A tensor that is in memory, or mapped."""
        return cls(tuple(x.shape), x.dtype, lambda first=0, last=None: x if last is None else x[first:last])


class WeightFile:
    """An open file of tensors. It keeps the content that it was opened with, whatever is saved over it."""

    shapes: dict[str, tuple[int, ...]]

    def stored(self, key: str) -> StoredTensor:
        """The tensor of that name in the file."""
        raise NotImplementedError

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, read, under its name in the file."""
        for key in self.shapes:
            yield key, self.stored(key).read()


def has_weights(folder: Path) -> bool:
    """Does a folder hold weights of a model in the Hugging Face layout?"""
    return any(current(folder, name).exists() for kind in _KINDS for name in kind)


def has_safetensors(folder: Path) -> bool:
    return any(current(folder, name).exists() for name in _KINDS[0])


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint; safetensors, where a folder has both kinds.

    Raises:
        FileNotFoundError: none, or a shard that the index names is missing.  ValueError: damaged index.
    """
    for single, index in _KINDS:
        if current(folder, single).exists():
            return [current(folder, single)]
        if current(folder, index).exists():
            return _shards(folder, index)
    raise FileNotFoundError(
        f"{folder} holds neither {SINGLE} nor {INDEX}; copy the weights of the checkpoint there ({OLD_SINGLE} will do)"
    )


def open_weights(path: Path) -> WeightFile:
    """Open one weight file.

    Raises:
        OSError: it cannot be read.  ValueError: it is damaged, or holds something else than tensors.
    """
    return _Safetensors(path) if path.suffix == ".safetensors" else _Bin(path)


def _shards(folder: Path, index_name: str) -> list[Path]:
    index = current(folder, index_name)
    weight_map = field(read_json(index), "weight_map", dict, index)
    names = sorted(set(items(list(weight_map.values()), str, "weight_map", index)))
    if not names or any(name != os.path.basename(name) for name in names):
        raise ValueError(f"{index}: weight_map does not map tensors to files beside it; copy the index again")
    missing = [name for name in names if not current(folder, name).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} of the {len(names)} shards in {index_name}; copy the rest"
        )
    return [current(folder, name) for name in names]


_LARGE = 1 << 20
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    "U8": torch.uint8,  # of MXFP4
}


class _Safetensors(WeightFile):
    """Tensors are read, not mapped, unless `mapped` is asked for: pages of a mapping would stay resident until the file is closed."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, _open(path)  # which checks the header
        self._bytes = open_read(path)
        length = int.from_bytes(self._bytes.read(8), "little")
        self._header = {key: x for key, x in json.loads(self._bytes.read(length)).items() if key != "__metadata__"}
        self._start = 8 + length
        self.shapes = {key: tuple(x["shape"]) for key, x in self._header.items()}
        self._mapping: MappedFile | None = None

    def stored(self, key: str) -> StoredTensor:
        entry = self._header[key]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            return StoredTensor.of(self._unusual(key))
        return StoredTensor(
            self.shapes[key], dtype, partial(self._read, entry, dtype), partial(self._mapped, *entry["data_offsets"])
        )

    def _mapped(self, begin: int, end: int) -> memoryview:
        if self._mapping is None:
            self._mapping = MappedFile(self._bytes, self._path, recover=True)
        return memoryview(self._mapping)[self._start + begin : self._start + end]

    def _unusual(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except SafetensorError as error:
            raise _damaged(self._path, error) from error

    def _read(self, entry: dict[str, Any], dtype: torch.dtype, first: int = 0, last: int | None = None) -> Tensor:
        shape: list[int] = entry["shape"]
        begin, row = entry["data_offsets"][0], prod(shape[1:]) * dtype.itemsize
        if last is not None:
            first, last = min(first, shape[0]), min(last, shape[0])
            shape, begin = [max(last - first, 0), *shape[1:]], begin + first * row
        x = room(shape, dtype)
        if x.numel():
            self._bytes.seek(self._start + begin)
            into: Any = x.view(-1).view(torch.uint8).numpy()
            if self._bytes.readinto(into) != len(into):
                raise _damaged(self._path, SafetensorError("the file ends within a tensor"))
        return x


class _Bin(WeightFile):
    def __init__(self, path: Path) -> None:
        self._tensors = check_tensors(read_pickled(path), path)
        self.shapes = {key: tuple(x.shape) for key, x in self._tensors.items()}

    def stored(self, key: str) -> StoredTensor:
        return StoredTensor.of(self._tensors[key])


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled, on the CPU. A large one is given back to the system at once when it is freed: malloc would keep tens
    of MB for the next one."""
    size = prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _open(path: Path) -> Any:
    open_read(path).close()  # whose errors name the file
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is damaged or cut short ({error}); copy or download the file again")
