"""Sums and gathers of tensors over ranks, in the order of the ranks: their bits depend on the number of ranks only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 1 << 24  # numbers that are summed at a time


@dataclass(frozen=True)
class Group:
    """Some of the ranks. size: how many. handle: torch's name for them; None: all."""

    size: int
    handle: Any = None


class Collectives:
    """The part of `Ranks` that exchanges tensors; its attributes are set there.

    tensor: how many ranks in a row see the same rows of a batch and divide every attention and MLP: they have one share of it.
    """

    rank: int
    size: int
    tensor: int
    device: torch.device

    def _wait(self, start: Callable[[], Any], what: str) -> None:
        raise NotImplementedError

    @property
    def share(self) -> int:
        """Which part of a batch this rank sees."""
        return self.rank // self.tensor

    @property
    def shares(self) -> int:
        """In how many parts a batch is divided."""
        return self.size // self.tensor

    @cached_property
    def mesh(self) -> Any:
        """torch's name for the ranks that divide parameters by rows; they make it together, at the same time."""
        return self._grid["data"] if self.tensor > 1 else self._grid

    @cached_property
    def tensor_mesh(self) -> Any:
        """torch's name for the ranks that divide attention and MLP, where `tensor` > 1."""
        return self._grid["tensor"]

    @cached_property
    def _grid(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh  # takes as long as torch

        if self.tensor == 1:
            return init_device_mesh(self.device.type, (self.size,))
        return init_device_mesh(self.device.type, (self.shares, self.tensor), mesh_dim_names=("data", "tensor"))

    @property
    def everyone(self) -> Group:
        return Group(self.size)

    @cached_property
    def data_group(self) -> Group:
        """The ranks that divide parameters by rows."""
        return Group(self.shares, self.mesh.get_group()) if self.tensor > 1 else self.everyone

    @cached_property
    def tensor_group(self) -> Group:
        """The ranks that divide attention and MLP."""
        return Group(self.tensor, self.tensor_mesh.get_group())

    def sum_gradients(self, parameters: Sequence[nn.Parameter], what: str) -> None:
        """Replace each gradient by its sum over the ranks; one that is missing counts as 0."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            total, at = self.total(flat, what, self.everyone), 0
            for p in bucket:
                part = total[at : at + p.numel()].view_as(p)
                p.grad = part.clone() if p.grad is None else p.grad.copy_(part)
                at += p.numel()

    def total(self, flat: Tensor, what: str, group: Group) -> Tensor:
        """The sum of `flat`, (n,), over the ranks of a group: each adds its part of the places in their order."""
        if flat.is_cuda:
            self._wait(lambda: dist.all_reduce(flat, group=group.handle, async_op=True), what)
            return flat
        part = -(-flat.numel() // group.size)
        padded = torch.nn.functional.pad(flat, (0, part * group.size - flat.numel()))
        own, total = padded.new_empty(part), torch.empty_like(padded)
        self.scatter_sum(own, padded, what, group)
        self.gather(total, own, what, group)
        return total[: flat.numel()]

    def scatter_sum(self, own: Tensor, parts: Tensor, what: str, group: Group) -> None:
        """Set `own`, (n,), to the sum over a group, in its order, of this rank's part of their `parts`, (size * n,)."""
        received = torch.empty_like(parts)
        self._wait(lambda: dist.all_to_all_single(received, parts, group=group.handle, async_op=True), what)
        first, *others = received.view(group.size, -1)
        own.copy_(first)
        for other in others:
            own += other

    def gather(self, parts: Tensor, own: Tensor, what: str, group: Group) -> None:
        """Set `parts`, (size * n,), to what the ranks of a group have as `own`, (n,), which may be a view of its part of it."""
        into, part = list(parts.view(torch.uint8).view(group.size, -1)), own.view(torch.uint8)
        self._wait(lambda: dist.all_gather(into, part, group=group.handle, async_op=True), what)

    def same(self, tensors: Iterator[Tensor], what: str) -> None:
        """Give every rank the values that rank 0 has."""
        if self.size > 1:
            for tensor in tensors:
                self._wait(lambda tensor=tensor: dist.broadcast(tensor.detach(), 0, async_op=True), what)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, at most `BUCKET` numbers together, or one larger one; the same in every step."""
    bucket: list[nn.Parameter] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
