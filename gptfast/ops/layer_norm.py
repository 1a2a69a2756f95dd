"""LayerNorm in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_floats, check_number, check_vector
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import dtype_code, new_of_code


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, as `F.layer_norm`
    (Ba et al., arXiv 1607.06450).

    Statistics are fp32, by two passes over a row that stays in cache. The gradients of weight and bias are summed in
    fp32 in a fixed order and rounded once, to the dtype of their own input.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        weight: (C,); any float dtype, such as float32 with bfloat16 activations.
        bias: (C,) or None; any float dtype.
        eps: added to the variance, >= 0.
        out_dtype: of the result, which is rounded to it once: of a float32 x the bits of layer_norm(x).to(out_dtype), without
            writing float32. Its gradient comes in that dtype; that of x has x's. None: x's dtype.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape, in out_dtype (under autocast too: None means x's dtype).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, eps or out_dtype.
    """
    check_norm("layer_norm", x, eps, weight=weight, bias=bias)
    y_dtype = result_dtype("layer_norm", out_dtype, x.dtype)
    runs_on = resolve("layer_norm", backend, x, weight, bias)
    if runs_on == "eager":
        return reference.layer_norm(x, weight, bias, float(eps), out_dtype=y_dtype)
    return _fused(runs_on, x, weight, bias, float(eps), KERNEL_DTYPES.index(y_dtype))[0]


def check_norm(op: str, x: Tensor, eps: float, **vectors: Tensor | None) -> None:
    """The checks that the norms share. vectors: weight and bias, (C,)."""
    check_floats(op, x=x, **vectors)
    C = x.shape[-1] if x.dim() else 0
    if C == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (..., C) with C >= 1")
    for name, vector in vectors.items():
        check_vector(op, name, vector, C, "x")
    check_number(op, "eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps is {eps}; expected a finite number >= 0, such as 1e-5")


def result_dtype(op: str, out_dtype: Any, normalised: torch.dtype) -> torch.dtype:
    """The dtype of y. normalised: of what is normalised, which None means."""
    if out_dtype is None:
        return normalised
    allowed = (*KERNEL_DTYPES, torch.float64) if normalised == torch.float64 else KERNEL_DTYPES
    if out_dtype not in allowed:
        names = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{op}: out_dtype is {out_dtype!r}; expected None or, for {normalised}, one of {names}")
    return out_dtype


def new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised statistics of each row: the mean and its rounding error in fp32, (2, rows); rstd, (rows)."""
    rows = x.numel() // x.shape[-1]
    return x.new_empty((2, rows), dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.bias_type = dtype_code(bias)


def _backward(ctx: Any, call: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = call("layer_norm_bwd", dy, *ctx.saved_tensors, ctx.bias_type)
    return dx, dweight, dbias if ctx.bias_type >= 0 else None, None, None


@register_fake("layer_norm_fwd")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, y_type: int) -> tuple[Tensor, Tensor, Tensor]:
    return new_of_code(x, x.shape, y_type), *new_statistics(x)


@register_fake("layer_norm_bwd")
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias_type: int) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), new_of_code(weight, weight.shape, bias_type)


_fused = differentiable("layer_norm_fwd", _save, _backward)
forbid_double_backward("layer_norm", "layer_norm_bwd")
