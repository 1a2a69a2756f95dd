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
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype where autocast is on for tensors on the device of x, else None."""
    kind = "cpu" if x.is_cpu else x.device.type  # the name alone takes half a microsecond
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on, as `F.linear` and SDPA take theirs; float64 stays."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    return tuple(t if t.dtype == dtype or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_product_dtypes(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The dtypes of a product must be equal, after `autocast`; nothing is cast to find out."""
    dtype, wide = autocast_dtype(x), torch.float64
    if bias is not None and bias.dtype != weight.dtype and (dtype is None or wide in (bias.dtype, weight.dtype)):
        raise TypeError(f"{op}: weight is {weight.dtype} but bias is {bias.dtype}; cast one, or use torch.autocast")
    if x.dtype != weight.dtype and (dtype is None or wide in (x.dtype, weight.dtype)):
        got = x.dtype if dtype is None or x.dtype == wide else dtype
        raise TypeError(f"{op}: x is {got} but weight is {weight.dtype}; cast one, or use torch.autocast")


def dtype_code(x: Tensor | None) -> int:
    """The dtype of x as the backward ops take it (the place in KERNEL_DTYPES); -1 where there is no x."""
    return -1 if x is None else KERNEL_DTYPES.index(x.dtype)


def new_of_code(like: Tensor, shape: Sequence[Any], code: int) -> Tensor:
    """An uninitialised tensor of the dtype of `dtype_code`, on the device of `like`; empty for -1."""
    if code < 0:
        return like.new_empty(0, dtype=torch.float32)
    return like.new_empty(shape, dtype=KERNEL_DTYPES[code])
