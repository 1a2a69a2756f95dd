"""SwiGLU (Shazeer, arXiv 2002.05202) and gpt-oss' form of it, forward and backward.

    y = (u + shift) g s,   s = sigmoid(alpha g),   g = min(gate, limit),   u = min(max(up, -limit), limit)
    dup = dy g s,   dgate = dy (u + shift) (s + alpha g s (1 - s));   0 where the clamp has cut

Gate and up are two tensors, or views of one: its halves, or its even and odd columns.
Floor: two reads and one write forward, three reads and two writes backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._rows import rows_of

BLOCK_R, BLOCK_C = 4, 512


def swiglu_fwd(gate: Tensor, up: Tensor | None, interleaved: bool, alpha: float, shift: float, limit: float) -> Tensor:
    shape = gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2)
    y = torch.empty(shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        g, u = _both(gate, up, interleaved)
        grid, sizes = _grid(g)
        _fwd_kernel[grid](g, u, y, g.stride(0), u.stride(0), *g.shape, alpha, shift, limit, STEP=g.stride(1), **sizes)
    return y


def swiglu_bwd(
    dout: Tensor, gate: Tensor, up: Tensor | None, interleaved: bool, alpha: float, shift: float, limit: float
) -> tuple[Tensor, Tensor]:
    """dgate has both gradients where gate has both; dup is then empty."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(0 if up is None else up.shape, dtype=gate.dtype, device=gate.device)
    if dout.numel():
        dy, (g, u) = rows_of(dout), _both(gate, up, interleaved)
        dg, du = _both(dgate, None if up is None else dup, interleaved)
        grid, sizes = _grid(g)
        strides = [t.stride(0) for t in (dy, g, u, dg, du)]
        numbers = (*g.shape, alpha, shift, limit)
        _bwd_kernel[grid](dy, g, u, dg, du, *strides, *numbers, STEP=g.stride(1), OUT_STEP=dg.stride(1), **sizes)
    return dgate, dup


def _both(gate: Tensor, up: Tensor | None, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up as (R, F) views with one distance between columns."""
    rows = rows_of(gate)
    if up is not None:
        return rows, rows_of(up)
    F = rows.shape[1] // 2
    return (rows[:, ::2], rows[:, 1::2]) if interleaved else (rows[:, :F], rows[:, F:])


def _grid(g: Tensor) -> tuple[tuple[int], dict[str, int]]:
    blocks = triton.cdiv(g.shape[0], BLOCK_R) * triton.cdiv(g.shape[1], BLOCK_C)
    return (blocks,), {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "num_warps": 4}


@triton.jit(do_not_specialize=["alpha", "shift", "limit"])
def _fwd_kernel(
    gate,
    up,
    y,
    gate_stride,
    up_stride,
    R,
    C,
    alpha,
    shift,
    limit,
    STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (r[:, None] < R) & (c < C)
    r64 = r.to(tl.int64)[:, None]
    g = tl.load(gate + r64 * gate_stride + c * STEP, inside, other=0.0).to(tl.float32)
    u = tl.load(up + r64 * up_stride + c * STEP, inside, other=0.0).to(tl.float32)
    g = tl.where(g > limit, limit, g)  # nan stays
    u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    result = (u + shift) * (g * _sigmoid(alpha * g))
    tl.store(y + r64 * C + c, result.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["alpha", "shift", "limit"])
def _bwd_kernel(
    dy,
    gate,
    up,
    dgate,
    dup,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    R,
    C,
    alpha,
    shift,
    limit,
    STEP: tl.constexpr,
    OUT_STEP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = (r[:, None] < R) & (c < C)
    r64 = r.to(tl.int64)[:, None]
    gate_in = tl.load(gate + r64 * gate_stride + c * STEP, inside, other=0.0).to(tl.float32)
    up_in = tl.load(up + r64 * up_stride + c * STEP, inside, other=0.0).to(tl.float32)
    d = tl.load(dy + r64 * dy_stride + c, inside, other=0.0).to(tl.float32)
    g = tl.where(gate_in > limit, limit, gate_in)
    u = tl.where(up_in > limit, limit, tl.where(up_in < -limit, -limit, up_in))
    z = alpha * g
    z = tl.where(z > 200.0, 200.0, tl.where(z < -200.0, -200.0, z))  # inf times the 0 of its slope would be nan
    s = _sigmoid(z)
    to_gate = d * (u + shift) * (s + z * s * _sigmoid(-z))  # 1 - s = sigmoid(-z), which does not cancel
    to_up = d * (g * s)
    to_gate = tl.where(gate_in > limit, 0.0, to_gate)
    to_up = tl.where(tl.abs(up_in) > limit, 0.0, to_up)
    tl.store(dgate + r64 * dgate_stride + c * OUT_STEP, to_gate.to(dgate.dtype.element_ty), inside)
    tl.store(dup + r64 * dup_stride + c * OUT_STEP, to_up.to(dup.dtype.element_ty), inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
