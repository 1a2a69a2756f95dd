"""Linear layers of many groups of rows, each with a weight of its own: the products of a mixture of experts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptfast.backend import is_many, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_same_device
from gptfast.ops._registry import define_python_op, differentiable, forbid_double_backward
from gptfast.ops._tensors import autocast, check_product_dtypes
from gptfast.ops.gemm import column_sums, gemm, grouped_gemm

OP = "grouped_linear"


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """x[r] weight[g]^T + bias[g], where row r belongs to group g: offsets[g] <= r < offsets[g + 1].

    A group's products have the bits of `linear`'s from 16 rows on; of fewer, a row's bits depend on no other row. A group without
    rows costs nothing. The gradients are exact sums over a group's
    rows, those of a group without rows are 0.

    Args:
        x: (M, in_features), any float dtype, rows of a group one after another.
        offsets: (G + 1,) int32 or int64, rising from 0 to M. Products read it on the CPU: on a GPU that waits for it.
        weight: (G, out_features, in_features), of x's dtype, or of any under autocast. Its gradient is laid out as it is, so
            the transpose of (G, in_features, out_features) costs no copy.
        bias: (G, out_features) or None.
        backend: see `gptfast.backend`.
    Returns:
        (M, out_features).
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, or offsets that do not rise from 0 to M.
    """
    check_float(OP, x=x, weight=weight, bias=bias)
    check_same_device(OP, x=x, offsets=offsets, weight=weight, bias=bias)
    check_product_dtypes(OP, x, weight, bias)
    x = autocast(x)[0]
    if resolve(OP, backend, x) == "eager" and x.device.type != "meta":
        _check(x, offsets, weight, bias)
        _ends(offsets, len(x))
        return reference.grouped_linear(x, offsets, autocast(weight)[0], None if bias is None else autocast(bias)[0])
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or is_many(x):
        return _fused("cpu", x, offsets, weight, bias)
    return _forward(x, offsets, weight, bias)  # without 20 us of dispatch


def _check(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"{OP}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected x (M, in_features) and "
            "weight (G, out_features, in_features)"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"{OP}: bias has shape {tuple(bias.shape)}; expected (G, out_features), {tuple(weight.shape[:2])}"
        )
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (len(weight) + 1,):
        raise ValueError(
            f"{OP}: offsets is {offsets.dtype} of shape {tuple(offsets.shape)}; expected int32 or int64 of shape "
            f"({len(weight) + 1},), one more than there are groups"
        )


def _ends(offsets: Tensor, rows: int) -> list[int]:
    """The offsets as numbers; ValueError where they do not rise from 0 to rows."""
    ends: list[int] = offsets.tolist()
    if ends[0] != 0 or ends[-1] != rows or any(a > b for a, b in pairwise(ends)):
        shown = ends if len(ends) <= 8 else [*ends[:7], "...", ends[-1]]
        raise ValueError(f"{OP}: offsets are {shown}; expected numbers that rise from 0 to {rows}, the rows of x")
    return ends


def _numbers(offsets: Tensor) -> Tensor:
    return offsets.to(torch.int64).contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, weight, bias = inputs
    ctx.save_for_backward(x, offsets, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, _, weight, bias = ctx.needs_input_grad
    dx, dweight, dbias = call("grouped_linear_bwd", dy, *ctx.saved_tensors, x, weight, bias)
    return dx if x else None, None, dweight if weight else None, dbias.to(ctx.bias_dtype) if bias else None


def _forward(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, offsets, weight, bias)
    _ends(offsets, len(x))
    return products_of_groups(x, _numbers(offsets), weight, bias)


def products_of_groups(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`grouped_linear` on the CPU, of contiguous int64 offsets. Nothing is checked, nor recorded for a gradient."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    grouped_gemm(x, offsets, weight.mT, y, dtype=x.dtype, bias=bias)
    return y


def _backward(
    dy: Tensor, x: Tensor, offsets: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, offsets, weight)
    if dy.shape != (len(x), weight.shape[1]):
        raise ValueError(f"{OP}: dy has shape {tuple(dy.shape)}; expected {(len(x), weight.shape[1])}")
    dx, dweight, dbias = _fake_backward(dy, x, offsets, weight, want_x, want_weight, want_bias)
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    ends = _ends(offsets, len(x))
    groups = [(g, a, b) for g, (a, b) in enumerate(pairwise(ends)) if a < b]
    if len(groups) < len(weight):  # the others have no rows
        dweight.zero_()
        dbias.zero_()
    if want_x:
        grouped_gemm(dy, _numbers(offsets), weight, dx, dtype=x.dtype)
    for g, first, last in groups:
        rows, sums = dy[first:last], dbias[g] if want_bias else None
        transposed = want_weight and dweight.stride(2) != 1
        if transposed:
            gemm(x[first:last].t(), rows, dweight[g].t(), dtype=x.dtype, of_groups=True)
        elif want_weight:
            gemm(rows.t(), x[first:last], dweight[g], dtype=x.dtype, a_sums=sums, of_groups=True)
        if sums is not None and (transposed or not want_weight):
            column_sums(rows, sums)
    return dx, dweight, dbias


def _fake_forward(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_backward(
    dy: Tensor, x: Tensor, offsets: Tensor, weight: Tensor, want_x: bool, want_weight: bool, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if want_x else (0,)),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),  # laid out as the weight
        x.new_empty(weight.shape[:2] if want_bias else (0,), dtype=torch.float32),
    )


define_python_op("grouped_linear_fwd", _forward, _fake_forward)
define_python_op("grouped_linear_bwd", _backward, _fake_backward)
_fused = differentiable("grouped_linear_fwd", _save, _differentiate)
forbid_double_backward(OP, "grouped_linear_bwd")
