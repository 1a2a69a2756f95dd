"""Precision and dropout that the reference ops share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptfast import rng


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def keep_scaled(
    x: Tensor, shape: tuple[int, int, int], p: float, seed: int, offset: int, matrices: bool = False
) -> Tensor:
    """Dropout by the Philox contract; `shape` numbers the elements of x. A nan in a dropped place is dropped.

    matrices: what is above the 32 bits of offset counts matrices, not rows.
    """
    if p == 0:
        return x
    first, number = divmod(offset, 2**32)
    keep = rng.dropout_keep(shape, p, seed, number, x.device, (first, 0) if matrices else (0, first)).view(x.shape)
    return torch.where(keep, x * rng.dropout_scale(p), 0.0)


def rows_of(x: Tensor) -> tuple[int, int, int]:
    """(1, rows, C): the shape by which the dropout contract numbers the elements of x."""
    return 1, math.prod(x.shape[:-1]), x.shape[-1]
