"""GELU with an optional bias: the worked example of how an op runs through the folders (see CONTRIBUTING.md)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_floats, check_vector
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake


def gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU(x + bias), equal to `F.gelu(x + bias, approximate=approximate)` but for rounding.

    z = x + bias;  "none": z Phi(z);  "tanh": 0.5 z (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3)))
    (Hendrycks and Gimpel, arXiv 1606.08415). Computed in fp32 for every dtype, in one pass over memory.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        bias: (C,) or None.
        approximate: "none" (exact, the default, as of `F.gelu`) or "tanh" (GPT-2's).
        backend: see `gptfast.backend`; None follows the surrounding choice.
    Returns:
        Tensor of x's shape and dtype. The gradient of `bias` is summed in fp32 in a fixed order.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or `approximate`.
    """
    check_floats("gelu", x=x, bias=bias)
    check_choice("gelu", "approximate", approximate, ("tanh", "none"))
    if bias is not None:
        check_vector("gelu", "bias", bias, x.shape[-1] if x.dim() else 1, "x")
    runs_on = resolve("gelu", backend, x, bias)
    if runs_on == "eager":
        return reference.gelu(x, bias, approximate)
    if x.dim() == 0:
        return _fused(runs_on, x[None], bias, approximate == "tanh")[0]
    return _fused(runs_on, x, bias, approximate == "tanh")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, call: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = call("gelu_bwd", dout, x, bias, ctx.tanh)
    return dx, dbias if bias is not None else None, None


@register_fake("gelu_fwd")
def _(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@register_fake("gelu_bwd")
def _(dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    dbias = x.new_empty(0, dtype=torch.float32) if bias is None else bias.new_empty(bias.shape)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dbias


_fused = differentiable("gelu_fwd", _save, _backward)
forbid_double_backward("gelu", "gelu_bwd")
