"""Squared ReLU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake


def relu_squared(x: Tensor, *, backend: str | None = None) -> Tensor:
    """max(x, 0)^2, as `F.relu(x).square()` but in one pass (So et al., Primer, arXiv 2109.08668; nanochat's activation).

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape and dtype, squared in fp32 and rounded once. Its gradient is 2 max(x, 0) times the incoming one.
    Raises:
        TypeError: wrong dtype.
    """
    check_float("relu_squared", x=x)
    runs_on = resolve("relu_squared", backend, x)
    if runs_on == "eager":
        return reference.relu_squared(x)
    return _fused(runs_on, x) if x.dim() else _fused(runs_on, x[None])[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, call: Any, dout: Tensor) -> Tensor:
    return call("relu_squared_bwd", dout, *ctx.saved_tensors)


@register_fake("relu_squared_fwd")
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("relu_squared_bwd")
def _(dout: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_fused = differentiable("relu_squared_fwd", _save, _backward)
forbid_double_backward("relu_squared", "relu_squared_bwd")
