"""What every op's Python side shares: argument checks with one way of speaking, and registration of op properties."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gptfast import _schemas
from gptfast.backend import KERNEL_DTYPES, has_cpu_ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_fakes: dict[str, Callable[..., Any]] = {}
_backward_ops: dict[str, str] = {}


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the shape function of the op <name>, here where it has compiled kernels, in `adopt` for other backends."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        shapes = _fakes[name] = _on_one_device(name, function)
        if has_cpu_ops and hasattr(torch.ops.gptfast, name):
            torch.library.register_fake(f"gptfast::{name}", shapes)
        return function

    return register


def _on_one_device(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for tensors on one device: torch runs shape functions where any tensor is on "meta", and results on the
    others' devices would hold anything."""

    def checked(*arguments: Any, **options: Any) -> Any:
        devices = {x.device for x in arguments if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{op}: tensors on {' and '.join(sorted(map(str, devices)))}; expected all on one device"
            )
        return function(*arguments, **options)

    return checked


def forbid_double_backward(op: str, name: str) -> None:
    """Make differentiating through the backward op <name> a clear error."""
    _backward_ops[name] = op
    if hasattr(torch.ops.gptfast, name):
        _raise_in_backward("gptfast", op, name)


def _raise_in_backward(namespace: str, op: str, name: str) -> None:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{op}: double backward is not implemented by the fused kernels; use gptfast.backend('eager') for this part"
        )

    torch.library.register_autograd(f"{namespace}::{name}", backward)


def define_python_op(name: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Register torch.ops.gptfast.<name>, written in Python, for tensors of any device: torch.compile sees one call.

    Args:
        name: of a schema in `_schemas.PYTHON`.
        function: the implementation.
        shapes: its fake.
    """
    library = _schemas.library("gptfast")
    _schemas.define("gptfast", [s for s in _schemas.PYTHON if _schemas.name_of(s) == name])
    library.impl(name, _on_one_device(name, function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptfast::{name}", _on_one_device(name, shapes), lib=library)


def adopt(namespace: str) -> None:
    """Give the ops of another namespace of torch.ops, whose names and schemas are gptfast's, the same properties."""
    for name, function in _fakes.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)
    for name, op in _backward_ops.items():
        if hasattr(getattr(torch.ops, namespace), name):
            _raise_in_backward(namespace, op, name)


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


def check_choice(op: str, name: str, got: object, choices: tuple[object, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{op}: {name} is {got!r}; expected one of {', '.join(map(repr, choices))}")


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


def dtype_code(x: Tensor | None) -> int:
    """The dtype of x as the backward ops take it (the place in KERNEL_DTYPES); -1 where there is no x."""
    return -1 if x is None else KERNEL_DTYPES.index(x.dtype)


def new_of_code(like: Tensor, shape: Sequence[Any], code: int) -> Tensor:
    """An uninitialised tensor of the dtype of `dtype_code`, on the device of `like`; empty for -1."""
    if code < 0:
        return like.new_empty(0, dtype=torch.float32)
    return like.new_empty(shape, dtype=KERNEL_DTYPES[code])


def check_probability(op: str, name: str, p: float) -> None:
    check_number(op, name, p)
    if not 0 <= p <= 1:  # also false for nan
        raise ValueError(f"{op}: {name} is {p}; expected a probability in [0, 1]")


def rows_of(x: Tensor) -> Tensor:
    """(..., C) as (N, C); a size of -1 would be ambiguous where C is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def distinct(*tensors: Any) -> list[Any]:
    """The same tensors, with a view in place of each repeat: Dynamo traces no Function that gets one tensor twice."""
    result: list[Tensor | None] = []  # in, and out: tensors or None
    for t in tensors:
        repeated = t is not None and any(t is other for other in result)
        result.append(t.view_as(t) if t is not None and repeated else t)
    return result


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype where autocast is on, as `F.linear` and SDPA take theirs; float64 stays."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)
