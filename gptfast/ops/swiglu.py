"""SwiGLU, the gated activation: plain as in Llama, or clamped as in gpt-oss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice
from gptfast.backend import resolve
from gptfast.ops import reference
from gptfast.ops._checks import check_float, check_number, check_same_device
from gptfast.ops._registry import differentiable, forbid_double_backward, register_fake

LAYOUTS = ("halves", "interleaved")


def swiglu(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    layout: str = "halves",
    backend: str | None = None,
) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202), or gpt-oss' form of it, in one pass over memory.

    With alpha: (up + 1) * gate * sigmoid(alpha * gate). With limit: gate is taken as at most limit, and up as within
    -limit and limit, before. gpt-oss is alpha=1.702, limit=7. Computed in fp32 for every dtype and rounded once; what the
    clamps cut has gradient 0, as of `torch.clamp`.

    Args:
        gate: (..., F), float32, bfloat16, float16 or float64; or (..., 2 F) with gate and up as columns of one product.
        up: (..., F), or None where gate has both.
        alpha: > 0; None: the plain form.
        limit: > 0; None: no clamps.
        layout: where gate has both: "halves" (gate, then up, as Phi-3) or "interleaved" (gate in the even columns, up in
            the odd ones, as gpt-oss).
        backend: see `gptfast.backend`.
    Returns:
        (..., F), of gate's dtype, or the one that gate and up promote to.
    Raises:
        TypeError, ValueError: wrong dtype, shape, device, alpha, limit or layout.
    """
    check_swiglu(gate, up, alpha, limit, layout)
    alpha, limit = (None if value is None else float(value) for value in (alpha, limit))  # also an int beyond 2^63
    if up is not None and gate.dtype != up.dtype:
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    runs_on = resolve("swiglu", backend, gate, up)
    if runs_on == "eager":
        return reference.swiglu(gate, up, alpha=alpha, limit=limit, layout=layout)
    slope, shift = (1.0, 0.0) if alpha is None else (alpha, 1.0)
    options = layout == "interleaved", slope, shift, math.inf if limit is None else limit
    if up is not None and gate.dim() == 0:
        return _fused(runs_on, gate[None], up[None], *options)[0]
    return _fused(runs_on, gate, up, *options)


def check_swiglu(gate: Tensor, up: Tensor | None, alpha: float | None, limit: float | None, layout: str) -> None:
    op, tensors = "swiglu", {"gate": gate} if up is None else {"gate": gate, "up": up}
    check_float(op, **tensors)
    check_same_device(op, **tensors)
    check_choice(op, "layout", layout, LAYOUTS)
    for name, value in (("alpha", alpha), ("limit", limit)):
        if value is None:
            continue
        check_number(op, name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{op}: {name} is {value}; expected None or a finite number > 0")
    if up is None and (gate.dim() == 0 or gate.shape[-1] % 2):
        raise ValueError(
            f"{op}: gate has shape {tuple(gate.shape)} and up is None; expected (..., 2 F), gate and up in one tensor"
        )
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"{op}: gate has shape {tuple(gate.shape)} but up has {tuple(up.shape)}; they must be equal")
    if up is not None and layout != "halves":
        raise ValueError(f"{op}: layout is {layout!r} but up is given; it says how one tensor holds both")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *options = inputs
    ctx.save_for_backward(gate, up)
    ctx.options = options


def _backward(ctx: Any, call: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    dgate, dup = call("swiglu_bwd", dout, gate, up, *ctx.options)
    return dgate, None if up is None else dup, None, None, None, None


@register_fake("swiglu_fwd")
def _(gate: Tensor, up: Tensor | None, interleaved: bool, alpha: float, shift: float, limit: float) -> Tensor:
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


@register_fake("swiglu_bwd")
def _(
    dout: Tensor, gate: Tensor, up: Tensor | None, interleaved: bool, alpha: float, shift: float, limit: float
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)


_fused = differentiable("swiglu_fwd", _save, _backward)
forbid_double_backward("swiglu", "swiglu_bwd")
