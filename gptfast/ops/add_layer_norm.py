"""Dropout, residual sum and LayerNorm in one pass: what joins the blocks of pre-norm and post-norm models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import KERNEL_DTYPES, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_floats, check_probability
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake
from gptfast.ops._tensors import dtype_code, new_of_code
from gptfast.ops.layer_norm import check_norm, new_statistics, result_dtype
from gptfast.ops.streams import stream


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | None = None,
    offset: int = 0,
    *,
    first_row: int = 0,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """total = dropout(x) + residual;  y = layer_norm(total).  Returns (y, total).

    Backward recomputes the dropout mask from (seed, offset); only total and two statistics a row are kept.

    Args:
        x: (..., C), the output of a branch.
        residual: shape of x; may be of another dtype, such as a float32 stream beside bfloat16 branches.
        weight, bias, eps: of the LayerNorm, as in `layer_norm`.
        dropout_p: probability in [0, 1] of dropping an element of x.
        seed, offset: of the mask, in [0, 2**64) and [0, 2**32); rows are numbered over the leading dimensions. A seed of
            None is drawn from torch's CPU generator.
        first_row: which row of the whole batch x's first one (of dimension 0) is, where x is a part of it: the mask is then
            that of this part, as if the whole had been dropped at once.
        out_dtype: of y, as in `layer_norm`; total keeps its own.
        backend: see `gptfast.backend`.
    Returns:
        (y, total), both of x's shape, in the dtype that x + residual has; y in out_dtype if that is given.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range.
    """
    op = "add_layer_norm"
    check_norm(op, x, eps, weight=weight, bias=bias)
    check_sum(op, x, residual, dropout_p)
    seed, offset = stream(op, seed, offset, dropout_p > 0, first_row, math.prod(x.shape[1:-1]))
    y_dtype = result_dtype(op, out_dtype, torch.promote_types(x.dtype, residual.dtype))
    runs_on = resolve(op, backend, x, residual, weight, bias)
    if runs_on == "eager":
        dropout = (dropout_p, seed, offset)
        return reference.add_layer_norm(x, residual, weight, bias, float(eps), *dropout, out_dtype=y_dtype)
    options = (float(eps), float(dropout_p), seed, offset, KERNEL_DTYPES.index(y_dtype))
    return _fused(runs_on, x, residual, weight, bias, *options)[:2]


def check_sum(op: str, x: Tensor, residual: Tensor, dropout_p: float) -> None:
    """The checks of dropout(x) + residual."""
    check_floats(op, x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual has shape {tuple(residual.shape)} but x has {tuple(x.shape)}; they must be equal"
        )
    check_probability(op, "dropout_p", dropout_p)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, dropout_p, seed, offset, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # a gradient of zeros would cost a pass over memory, traced too
    ctx.options = dtype_code(bias), dtype_code(x), dtype_code(residual), dropout_p, seed, offset


def _backward(ctx: Any, call: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None and dtotal is None:
        return (None,) * 9
    dx, dresidual, dweight, dbias = call("add_layer_norm_bwd", dy, dtotal, *ctx.saved_tensors, *ctx.options)
    bias_type, x_type, residual_type, dropout_p = ctx.options[:4]
    if x_type == residual_type and rng.dropout_threshold(dropout_p) == 0:
        dx = dresidual
    return dx, dresidual, dweight, dbias if bias_type >= 0 else None, None, None, None, None, None


@register_fake("add_layer_norm_fwd")
def _(x: Tensor, residual: Tensor, *options: Any) -> tuple[Tensor, ...]:
    dtype = x.dtype if x.dtype == residual.dtype else torch.float32
    return new_of_code(x, x.shape, options[-1]), x.new_empty(x.shape, dtype=dtype), *new_statistics(x)


@register_fake("add_layer_norm_bwd")
def _(
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_type: int,
    x_type: int,
    residual_type: int,
    dropout_p: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, ...]:
    own_dx = rng.dropout_threshold(dropout_p) != 0 or x_type != residual_type
    dx = new_of_code(total, total.shape if own_dx else (0,), x_type)
    dresidual = new_of_code(total, total.shape, residual_type)
    return dx, dresidual, weight.new_empty(weight.shape), new_of_code(weight, weight.shape, bias_type)


_fused = differentiable("add_layer_norm_fwd", _save, _backward)
forbid_double_backward("add_layer_norm", "add_layer_norm_bwd")
