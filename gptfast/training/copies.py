"""Memory for the copies of tensors that are written while training goes on."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_BLOCK = 64 << 20  # bytes, at least
_ALIGNED = 64  # bytes, a line of the processor's cache
_BETWEEN = 1 << 20  # bytes, for scalars and the ends of the lines


class Copies:
    """Copies tensors to memory that stays from one save to the next.

    Memory that a process gets from the system is given and cleared a page at a time, when it is first written: that takes three
    times as long as the copy. Here it is so once, and in pages of 2 MB where the system has them (Linux).
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._block, self._at = 0, 0  # where the next copy begins

    def begin(self, size: int = 0) -> None:
        """Begin a save: its copies take the place of those before.

        Args:
            size: bytes that it will have; as much memory is taken from the system now.
        """
        if size and not self._blocks:
            self._blocks.append(_memory(size + _BETWEEN).zero_())
        self._block, self._at = 0, 0

    def take(self, x: Tensor) -> Tensor:
        """A copy of a tensor on the CPU, with its strides if it is contiguous or transposed, else contiguous."""
        x = x.detach()
        if x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous():
            return self.take(x.t()).t()
        return self._room(x.nbytes).view(x.dtype).view(x.shape).copy_(x)

    def _room(self, size: int) -> Tensor:
        while self._block < len(self._blocks) and self._at + size > len(self._blocks[self._block]):
            self._block, self._at = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(_memory(max(size, _BLOCK)))
        begin, self._at = self._at, self._at - -size // _ALIGNED * _ALIGNED
        return self._blocks[self._block][begin : begin + size]


def _memory(size: int) -> Tensor:
    """Bytes that no other process sees."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    found = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            found.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(found, dtype=torch.uint8)
