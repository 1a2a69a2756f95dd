"""Properties of operators: fakes (shape functions), the error of a double backward, operators written in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast import _schemas
from gptfast.backend import has_cpu_ops

_fakes: dict[str, Callable[..., Any]] = {}
_backward_ops: dict[str, str] = {}


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the fake of the operator <name> for the compiled kernels; `register_fakes` does so for other backends."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        shapes = _fakes[name] = _on_one_device(name, function)
        if has_cpu_ops and hasattr(torch.ops.gptfast, name):
            torch.library.register_fake(f"gptfast::{name}", shapes)
        return function

    return register


def _on_one_device(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a check that all tensors are on one device: torch calls a fake if any of them is on "meta", and the
    result for the others would be uninitialised."""

    def checked(*arguments: Any, **options: Any) -> Any:
        single = [part for x in arguments for part in (x if isinstance(x, (list, tuple)) else [x])]
        devices = {x.device for x in single if isinstance(x, Tensor)}
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
    library.impl(name, _below_autograd(_on_one_device(name, function)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptfast::{name}", _on_one_device(name, shapes), lib=library)


def _below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with what it calls unrecorded, as in a kernel: an exported graph calls operators where gradients are on,
    and the products that write into their result refuse that."""

    def unrecorded(*arguments: Any, **options: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return function(*arguments, **options)

    return unrecorded


def register_fakes(namespace: str) -> None:
    """Give the ops of another namespace of torch.ops, whose names and schemas are gptfast's, the same properties."""
    for name, function in _fakes.items():
        if hasattr(getattr(torch.ops, namespace), name):
            torch.library.register_fake(f"{namespace}::{name}", function)
    for name, op in _backward_ops.items():
        if hasattr(getattr(torch.ops, namespace), name):
            _raise_in_backward(namespace, op, name)
