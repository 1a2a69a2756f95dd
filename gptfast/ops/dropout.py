"""Dropout by the Philox contract: the mask is a function of (seed, offset, row, column)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast import rng
from gptfast.backend import has_cpu_ops, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_probability
from gptfast.ops._registry import differentiable, register_fake
from gptfast.ops.streams import stream


def dropout(
    x: Tensor,
    p: float = 0.5,
    seed: int | None = None,
    offset: int = 0,
    *,
    first_row: int = 0,
    backend: str | None = None,
) -> Tensor:
    """x / (1 - p) where an element is kept, 0 elsewhere (Srivastava et al., JMLR 15, 2014).

    p is rounded to a multiple of 1/65536. The mask is `dropout_mask((1, rows, C), p, seed=seed, offset=offset)` with
    the leading dimensions of x as rows; backward recomputes it, nothing is saved.

    Args:
        x: (..., C), float32, bfloat16, float16 or float64.
        p: probability in [0, 1] of dropping an element; 1 drops everything. There is no `training` as of `F.dropout`: call it
            in training only.
        seed, offset: in [0, 2**64) and [0, 2**32). The same pair gives the same mask on every backend. A seed of None is
            drawn from torch's CPU generator, as `F.dropout` draws its mask: `torch.manual_seed` decides it.
        first_row: which row of the whole batch x's first one (of dimension 0) is, where x is a part of it: the mask is then
            that of this part, as if the whole had been dropped at once.
        backend: see `gptfast.backend`.
    Returns:
        Tensor of x's shape and dtype.
    Raises:
        TypeError, ValueError: wrong dtype or range.
    """
    check_float("dropout", x=x)
    check_probability("dropout", "p", p)
    if x.dim() == 0:
        return dropout(x[None], p, seed, offset, first_row=first_row, backend=backend)[0]
    seed, offset = stream("dropout", seed, offset, p > 0, first_row, math.prod(x.shape[1:-1]))
    runs_on = resolve("dropout", backend, x)
    if runs_on == "eager":
        return reference.dropout(x, p, seed, offset)
    return _fused(runs_on, x, float(p), seed, offset)


def dropout_mask(shape: tuple[int, int, int], p: float, *, seed: int = 0, offset: int = 0) -> Tensor:
    """Which elements dropout keeps: what `dropout`, `add_layer_norm` and `causal_attention` apply.

    Args:
        shape: (matrices, rows, cols). causal_attention: (B * H, T, S); the others: (1, rows, C).
        p: probability in [0, 1] of dropping an element.
        seed, offset: in [0, 2**64) and [0, 2**32).
    Returns:
        bool tensor of `shape` on the CPU, True where kept.
    Raises:
        TypeError, ValueError: wrong shape or range.
    """
    if len(shape) != 3 or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"dropout_mask: shape is {tuple(shape)}; expected three sizes (matrices, rows, cols)")
    check_probability("dropout_mask", "p", p)
    rng.check_counter("dropout_mask", "seed", seed, 64)
    rng.check_counter("dropout_mask", "offset", offset)
    if not has_cpu_ops:
        return rng.dropout_keep(shape, p, seed, offset)
    return torch.ops.gptfast.dropout_mask(*shape, float(p), rng.as_int64(seed), offset)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _backward(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return call("dropout", dy, *ctx.options), None, None, None  # linear: differentiable any number of times


@register_fake("dropout")
def _(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("dropout_mask")
def _(matrices: int, rows: int, cols: int, p: float, seed: int, offset: int) -> Tensor:
    return torch.empty(matrices, rows, cols, dtype=torch.bool, device="cpu")


_fused = differentiable("dropout", _save, _backward)
