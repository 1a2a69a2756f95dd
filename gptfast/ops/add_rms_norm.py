"""Dropout, residual sum and RMSNorm in one pass: what joins the blocks of Llama-shaped models."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops.add_layer_norm import check_sum
from gptfast.ops.layer_norm import check_norm, result_dtype
from gptfast.ops.rms_norm import weights_of
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
    resolve(op, backend, x, residual, weight)
    return reference.add_rms_norm(x, residual, weight, float(eps), dropout_p, seed, offset, out_dtype=y_dtype)
