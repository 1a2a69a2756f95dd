"""Dropout, residual sum and RMSNorm in one pass: what joins the blocks of Llama-shaped models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import KERNEL_DTYPES, resolve
from gptfast.ops import reference
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import dtype_code, new_of_code
from gptfast.ops.add_layer_norm import check_sum
from gptfast.ops.layer_norm import check_norm, result_dtype
from gptfast.ops.rms_norm import new_dweight, new_rstd, weights_of
from gptfast.ops.streams import stream


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    *,
    first_row: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """total = dropout(x) + residual;  y = rms_norm(total).  Returns (y, total).

    Backward recomputes the dropout mask from (seed, offset); only total and one statistic a row are kept.

    Args:
        x: (..., C), the output of a branch.
        residual: shape of x; may be of another dtype, such as a float32 stream beside bfloat16 branches.
        weight, eps: as in `rms_norm`.
        dropout_p, seed, offset, first_row: of the mask of x, as in `add_layer_norm`.
        out_dtype: of y, as in `layer_norm`; total keeps its own.
        backend: see `gptfast.backend`.
    Returns:
        (y, total), both of x's shape, in the dtype that x + residual has; y in out_dtype if that is given.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
    """
    op = "add_rms_norm"
    check_norm(op, x, eps, **weights_of(weight))
    check_sum(op, x, residual, dropout_p)
    seed, offset = stream(op, seed, offset, dropout_p > 0, first_row, math.prod(x.shape[1:-1]))
    y_dtype = result_dtype(op, out_dtype, torch.promote_types(x.dtype, residual.dtype))
    runs_on = resolve(op, backend, x, residual, weight)
    if runs_on == "eager":
        return reference.add_rms_norm(x, residual, weight, float(eps), dropout_p, seed, offset, out_dtype=y_dtype)
    options = (float(eps), float(dropout_p), seed, offset, KERNEL_DTYPES.index(y_dtype))
    return _fused(runs_on, x, residual, weight, *options)[:2]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, _, dropout_p, seed, offset, _ = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # a gradient of zeros would cost a pass over memory
    ctx.options = dtype_code(x), dtype_code(residual), dropout_p, seed, offset


def _backward(ctx: Any, call: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None and dtotal is None:
        return (None,) * 8
    total, weight, rstd = ctx.saved_tensors
    dx, dresidual, dweight = call("add_rms_norm_bwd", dy, dtotal, total, weight, rstd, *ctx.options)
    x_type, residual_type, dropout_p = ctx.options[:3]
    if x_type == residual_type and rng.dropout_threshold(dropout_p) == 0:
        dx = dresidual
    return dx, dresidual, None if weight is None else dweight, None, None, None, None, None


@register_fake("add_rms_norm_fwd")
def _(x: Tensor, residual: Tensor, *options: Any) -> tuple[Tensor, ...]:
    dtype = x.dtype if x.dtype == residual.dtype else torch.float32
    return new_of_code(x, x.shape, options[-1]), x.new_empty(x.shape, dtype=dtype), new_rstd(x)


@register_fake("add_rms_norm_bwd")
def _(
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    x_type: int,
    residual_type: int,
    dropout_p: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, ...]:
    own_dx = rng.dropout_threshold(dropout_p) != 0 or x_type != residual_type
    dx = new_of_code(total, total.shape if own_dx else (0,), x_type)
    return dx, new_of_code(total, total.shape, residual_type), new_dweight(total, weight)


_fused = differentiable("add_rms_norm_fwd", _save, _backward)
forbid_double_backward("add_rms_norm", "add_rms_norm_bwd")
