"""Which part of a parameter each rank has, where ranks divide a model: boxes of the whole tensor, and tensors from their parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gptfast.training.ranks import Ranks

if TYPE_CHECKING:  # to import it takes as long as torch
    from torch.distributed.tensor import DTensor

Box = tuple[slice, ...]
_QKV = re.compile(r"(^|[./])attn\.c_attn\.(weight|bias)$")


@dataclass(frozen=True)
class Division:
    """How ranks divide a tensor. First those that share rows of a batch divide dimension `dim`, evenly; then each of these
    parts is divided by rows among the ranks of one number in their shares.

    Args:
        shape: of the whole tensor; at least one dimension.
        rank, size: this rank, of how many.
        tensor: ranks of a share of a batch, see `Ranks`.
        dim: 0 or 1; None: all ranks of a share have the same.
        bands: the rows are as many tensors one after the other, of each of which a rank has its part: 3 where they are those
            of queries, keys and values, which heads divide.
    """

    shape: tuple[int, ...]
    rank: int
    size: int
    tensor: int = 1
    dim: int | None = None
    bands: int = 1

    def of(self, rank: int) -> Division:
        """That of another rank."""
        return replace(self, rank=rank)

    @property
    def is_first(self) -> bool:
        """Whether no rank before this one has the same part."""
        return self.dim is not None or self.rank % self.tensor == 0

    def boxes(self) -> Iterator[Box]:
        """The boxes of the whole that this rank has, in the order of its rows, each of all columns of its part."""
        row, column = divmod(self.rank, self.tensor)
        rows = self.shape[0] // (self.tensor if self.dim == 0 else 1)
        each = -(-rows // (self.size // self.tensor))
        first, last = min(rows, row * each), min(rows, (row + 1) * each)
        columns = [slice(0, n) for n in self.shape[1:]]
        if self.dim == 1:
            part = self.shape[1] // self.tensor
            columns[0] = slice(column * part, (column + 1) * part)
        band = rows // self.bands
        for number in range(self.bands):
            start, end = max(first, number * band), min(last, (number + 1) * band)
            shift = number * (self.shape[0] // self.bands - band) + (column * band if self.dim == 0 else 0)
            if start < end:
                yield slice(start + shift, end + shift), *columns

    def pieces(self, own: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """The boxes, and the part of this rank's own tensor that lies in each."""
        start = 0
        for box in self.boxes():
            rows = box[0].stop - box[0].start
            yield box, own[start : start + rows]
            start += rows

    @property
    def shape_of_own(self) -> tuple[int, ...]:
        """Of what this rank has; (0,): nothing."""
        boxes = [[s.stop - s.start for s in box] for box in self.boxes()]
        return (sum(box[0] for box in boxes), *boxes[0][1:]) if boxes else (0,)

    def put_together(self, parts: Mapping[int, Tensor]) -> Tensor:
        """The whole tensor from the parts of the ranks, without those that others have too."""
        whole = next(iter(parts.values())).new_empty(self.shape)
        for rank, part in parts.items():
            for box, piece in self.of(rank).pieces(part):
                whole[box] = piece
        return whole


def division_of(name: str, tensor: Tensor, ranks: Ranks | None) -> Division:
    """How a tensor is divided among the ranks; one that is not divided is all of this rank's.

    Args:
        name: of a parameter, or of its state in an optimizer.
        tensor: with at least one dimension.
    """
    shape = tuple(tensor.shape)
    if ranks is None or not is_sharded(tensor):
        return Division(shape, 0, 1)
    dim = cast("DTensor", tensor).placements[1].dim if is_divided(tensor) else None  # pyright: ignore[reportAttributeAccessIssue]
    bands = 3 if dim == 0 and _QKV.search(name) else 1
    return Division(shape, ranks.rank, ranks.size, ranks.tensor, dim, bands)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank has a part of the tensor only."""
    return hasattr(tensor, "device_mesh")


def is_divided(tensor: Tensor) -> bool:
    """Whether tensor parallelism divides the tensor."""
    placements = getattr(tensor, "placements", ())
    return len(placements) > 1 and placements[1].is_shard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; the tensor itself where it is whole."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def gathered(name: str, tensor: Tensor, ranks: Ranks) -> Tensor:
    """The whole of a tensor; all ranks call it."""
    division, own = division_of(name, tensor, ranks), local(tensor).detach().flatten()
    if division.size == 1:
        return own.view(tensor.shape)
    shapes = [division.of(rank).shape_of_own for rank in range(ranks.size)]
    longest = max(map(prod, shapes))
    padded, parts = own.new_zeros(longest), own.new_empty(ranks.size * longest)
    padded[: own.numel()] = own
    ranks.gather(parts, padded, f"the values of {name}", ranks.everyone)
    rows = parts.view(ranks.size, longest)
    first = [rank for rank in range(ranks.size) if division.of(rank).is_first]
    return division.put_together({rank: rows[rank, : prod(shapes[rank])].view(shapes[rank]) for rank in first})


@torch.no_grad()
def fill(name: str, tensor: Tensor, whole: Tensor, ranks: Ranks | None) -> None:
    """Give this rank's part of a tensor the values of the whole."""
    for box, piece in division_of(name, tensor, ranks).pieces(local(tensor)):
        piece.copy_(whole[box])
