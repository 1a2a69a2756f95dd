"""What ops do to tensors before and after an operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (N, C); a size of -1 would be ambiguous where C is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on, as `F.linear` and SDPA take theirs; float64 stays."""
    device = "cpu" if tensors[0].is_cpu else tensors[0].device.type  # the name alone takes half a microsecond
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def dtype_code(x: Tensor | None) -> int:
    """The dtype of x as the backward ops take it (the place in KERNEL_DTYPES); -1 where there is no x."""
    return -1 if x is None else KERNEL_DTYPES.index(x.dtype)


def new_of_code(like: Tensor, shape: Sequence[Any], code: int) -> Tensor:
    """An uninitialised tensor of the dtype of `dtype_code`, on the device of `like`; empty for -1."""
    if code < 0:
        return like.new_empty(0, dtype=torch.float32)
    return like.new_empty(shape, dtype=KERNEL_DTYPES[code])
