"""Checks of the ops' arguments: tensors, and numbers that torch.compile may trace."""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPTIONAL = ("bias", "wpe", "sinks")  # tensors that an op may do without


def check_float(op: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None and name in OPTIONAL:
            continue
        dtype = check_dense(op, name, x).dtype
        if dtype not in FLOATS:
            raise TypeError(f"{op}: {name} has dtype {dtype}; expected float32, bfloat16, float16 or float64")


def check_floats(op: str, **tensors: Tensor | None) -> None:
    """`check_float` and `check_same_device`, in one pass over tensors that are right."""
    device = None
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.layout is torch.strided and x.dtype in FLOATS:
            if device is None:
                device = x.device
            elif x.device != device:
                break
        elif x is not None or name not in OPTIONAL:
            break
    else:
        return
    check_float(op, **tensors)
    check_same_device(op, **tensors)


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
    if v is not None and v.shape != (size,):
        raise ValueError(f"{op}: {name} has shape {tuple(v.shape)}; expected ({size},), the last dimension of {of}")


def check_number(op: str, name: str, x: float) -> None:
    """`x` must be a number that a float holds; True is none."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat, Real)):
        raise TypeError(f"{op}: {name} is {x!r} ({type(x).__name__}); expected a number")
    if isinstance(x, int) and abs(x) > sys.float_info.max:
        raise ValueError(f"{op}: {name} is an int of {x.bit_length()} bits; expected a number that a float can hold")


def check_int(op: str, name: str, x: int, least: int = -(2**63), what: str = "") -> None:
    """`x` must be an int that an operator can take, and at least `least`; `what` says what it is good for."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt, Integral)):
        raise TypeError(f"{op}: {name} is {x!r} ({type(x).__name__}); expected an int{what}")
    if not least <= x < 2**63:
        raise ValueError(f"{op}: {name} is {x}; expected an int from {least} to 2**63 - 1{what}")


def check_probability(op: str, name: str, p: float) -> None:
    check_number(op, name, p)
    if not 0 <= p <= 1:  # also false for nan
        raise ValueError(f"{op}: {name} is {p}; expected a probability in [0, 1]")
