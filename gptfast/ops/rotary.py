"""Rotary position embedding: pairs of channels of queries and keys turned by an angle of their position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import has_values, resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_dense, check_float, check_same_device
from gptfast.ops._registry import differentiable, register_fake

OP = "rotary"
LAYOUTS = ("neox", "interleaved")


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    layout: str = "neox",
    backend: str | None = None,
) -> Tensor:
    """x with its first R = 2 * cos.shape[-1] channels rotated by position (Su et al., RoFormer, arXiv 2104.09864).

    Channels a and b of pair i become a cos - b sin and b cos + a sin, of row `position` and column i of the tables.
    "neox": pair i is channels i and R/2 + i (GPT-NeoX, Llama, gpt-oss). "interleaved": 2 i and 2 i + 1 (GPT-J, RoFormer).
    Computed in fp32 and rounded once: transformers rounds the tables to x's dtype first, which differs in 16 bits. The
    derivative is the inverse rotation, itself differentiable; the tables get none.

    Args:
        x: (B, H, T, D), float32, bfloat16, float16 or float64; any strides with contiguous channels cost no copy.
        cos, sin: (n, R/2), float32 or float64, 2 <= R <= D: the tables of positions 0 to n - 1, from `rotary_tables`.
        positions: (T,), (1, T) or (B, T) int64 or int32 in [0, n); None: 0 to T - 1. For tokens s to s + T - 1 rows s on of
            the tables do the same: `rotary(x, cos[s:], sin[s:])`.
        layout: "neox" or "interleaved".
        backend: see `gptfast.backend`.
    Returns:
        (B, H, T, D) of x's dtype; the kernels store it as (B, T, H, D), as attention stores its results.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device or layout.
        IndexError: a position outside the tables. On a GPU, which cannot look without waiting, such a token is nan instead.
    """
    check_rotary(x, cos, sin, positions, layout)
    runs_on = resolve(OP, backend, x, cos, sin)
    if runs_on in ("cpu", "eager"):
        _check_range(positions, len(cos))
    cos, sin = cos.detach(), sin.detach()
    if runs_on == "eager":
        return reference.rotary(x, cos, sin, positions=positions, layout=layout)
    places = None if positions is None else positions.long()
    return _fused(runs_on, x, cos, sin, places, layout == "interleaved", False)


def check_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, layout: str) -> None:
    check_float(OP, x=x)
    for name, table in (("cos", cos), ("sin", sin)):
        if check_dense(OP, name, table).dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{OP}: {name} has dtype {table.dtype}; expected float32, as rotary_tables makes it: 16 bits cannot tell "
                "positions apart"
            )
    check_same_device(OP, x=x, cos=cos, sin=sin, positions=positions)
    check_choice(OP, "layout", layout, LAYOUTS)
    if x.dim() != 4:
        raise ValueError(f"{OP}: x has shape {tuple(x.shape)}; expected (B, H, T, D)")
    B, _, T, D = x.shape
    if cos.dim() != 2 or cos.shape != sin.shape or not 2 <= 2 * cos.shape[1] <= D:
        raise ValueError(
            f"{OP}: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; expected both (positions, R/2) with R "
            f"from 2 to the {D} channels of x"
        )
    if positions is None:
        if len(cos) < T:
            raise ValueError(f"{OP}: x has {T} positions but cos has {len(cos)} rows; make longer tables")
        return
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: positions has dtype {positions.dtype}; expected int64 or int32")
    if tuple(positions.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(f"{OP}: positions has shape {tuple(positions.shape)}; expected ({T},) or ({B}, {T})")


def _check_range(positions: Tensor | None, rows: int) -> None:
    if (
        positions is None
        or torch.compiler.is_compiling()
        or positions.device.type != "cpu"
        or not has_values(positions)
    ):
        return
    if not positions.numel():
        return
    low, high = (int(x) for x in positions.aminmax())
    if low < 0 or high >= rows:
        raise IndexError(
            f"{OP}: positions holds {high if low >= 0 else low}; expected 0 to {rows - 1}, the rows of cos and sin"
        )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, call: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    interleaved, inverse = ctx.options
    dx = call("rotary", dy, *ctx.saved_tensors, interleaved, not inverse)
    return dx, None, None, None, None, None  # linear: differentiable any number of times


@register_fake("rotary")
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


_fused = differentiable("rotary", _save, _backward)
