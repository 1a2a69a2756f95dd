"""Checks of the ops' tensors; those of numbers are in `gptfast._checks`."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONAL = ("bias", "wpe")  # tensors that an op may do without


def check_float(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None and name in OPTIONAL:
            continue
        dtype = check_dense(op, name, x).dtype
        if dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {dtype}; expected float32, bfloat16, float16 or float64")


def check_dense(op: str, name: str, x: object) -> Tensor:
    """`x`, which must be a tensor whose elements all lie in memory."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; expected a torch.Tensor")
    if x.layout is not torch.strided:
        raise TypeError(f"{op}: {name} has layout {x.layout}; expected a dense tensor - call .to_dense()")
    return x


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is a {type(x).__name__}; expected a torch.Tensor")
    present = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(present.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in present.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {got}; move them with .to(device)")


def check_vector(op: str, name: str, v: Tensor | None, size: int, of: str) -> None:
    """`v` must have shape (size,), where `of` says what the size comes from."""
    if v is not None and tuple(v.shape) != (size,):
        raise ValueError(f"{op}: {name} has shape {tuple(v.shape)}; expected ({size},), the last dimension of {of}")
