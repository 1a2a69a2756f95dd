"""GELU(x + bias), forward and backward (Hendrycks and Gimpel, arXiv 1606.08415).

    none: z Phi(z);   tanh: z sigmoid(2 u), u = sqrt(2/pi) (z + 0.044715 z^3), as (1 + tanh u) / 2 = sigmoid(2 u)

Floor: one read and one write forward, two reads and one write backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._rows import load_vector, rows_of, rows_per_program, sum_rows

BLOCK_R, BLOCK_C = 4, 512
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


def gelu_fwd(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return out
    rows = rows_of(x)
    R, C = rows.shape
    grid = (triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)
    _fwd_kernel[grid](
        rows,
        None if bias is None else bias.contiguous(),
        out,
        rows.stride(0),
        R,
        C,
        TANH=tanh,
        BLOCK_R=BLOCK_R,
        BLOCK_C=BLOCK_C,
        num_warps=4,
    )
    return out


def gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, upstream = (rows_of(t) if x.numel() else t.reshape(0, t.shape[-1]) for t in (x, dout))
    R, C = rows.shape
    per_program = rows_per_program(R, BLOCK_R) if bias is not None else BLOCK_R
    programs = triton.cdiv(R, per_program)
    partial = x.new_empty((programs, C) if bias is not None else (0, 0), dtype=torch.float32)
    if x.numel():
        _bwd_kernel[(programs * triton.cdiv(C, BLOCK_C),)](
            upstream,
            rows,
            None if bias is None else bias.contiguous(),
            dx,
            partial,
            upstream.stride(0),
            rows.stride(0),
            R,
            C,
            per_program,
            TANH=tanh,
            BLOCK_R=BLOCK_R,
            BLOCK_C=BLOCK_C,
            num_warps=4,
        )
    return dx, sum_rows(partial, torch.float32 if bias is None else bias.dtype)


@triton.jit
def _fwd_kernel(x, bias, out, x_stride, R, C, TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    column_blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r[:, None] < R) & (c[None, :] < C)
    r64 = r.to(tl.int64)[:, None]
    z = tl.load(x + r64 * x_stride + c[None, :], inside, other=0.0).to(tl.float32)
    z += load_vector(bias, c, C)[None, :]
    y = z * _sigmoid(_inner(z)) if TANH else z * _phi(z)
    tl.store(out + r64 * C + c[None, :], y.to(out.dtype.element_ty), inside)


@triton.jit
def _bwd_kernel(
    dout,
    x,
    bias,
    dx,
    partial,
    dout_stride,
    x_stride,
    R,
    C,
    rows_per_program,
    TANH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    column_blocks = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0) // column_blocks
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    shift = load_vector(bias, c, C)[None, :]
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r0 in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, R), BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (r[:, None] < R) & (c[None, :] < C)
        r64 = r.to(tl.int64)[:, None]
        z = tl.load(x + r64 * x_stride + c[None, :], inside, other=0.0).to(tl.float32) + shift
        g = tl.load(dout + r64 * dout_stride + c[None, :], inside, other=0.0).to(tl.float32)
        dz = g * (_tanh_slope(z) if TANH else _phi(z) + z * DENSITY_AT_0 * tl.exp(-0.5 * z * z))
        tl.store(dx + r64 * C + c[None, :], dz.to(dx.dtype.element_ty), inside)
        dbias += dz
    if bias is not None:
        tl.store(partial + program.to(tl.int64) * C + c, tl.sum(dbias, 0), c < C)


@triton.jit
def _phi(z):
    return 0.5 * (1.0 + tl.erf(z * SQRT_HALF))


@triton.jit
def _inner(z):
    return (z + z * z * z * CUBIC) * TWO_SQRT_2_OVER_PI


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh_slope(z):
    """d(z s)/dz = s + z s (1 - s) d(2u)/dz, s = sigmoid(2 u); the second term is nothing where its factors overflow."""
    inner = _inner(z)
    s = _sigmoid(inner)
    steep = tl.abs(inner) < 80.0
    slope = (1.0 + 3.0 * (z * z * CUBIC)) * TWO_SQRT_2_OVER_PI
    return s + tl.where(steep, z * s * _sigmoid(-inner) * slope, 0.0)
