"""Rotary position embedding (Su et al., arXiv 2104.09864), forward and, with the sign of the sine turned, backward.

    (a, b) -> (a cos - b sin, b cos + a sin)    for pairs of channels: i and half + i, or 2 i and 2 i + 1

A program has some rows of the result, which is stored as (B, T, H, D). Floor: one read and one write of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 16


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """A position outside the tables gives a token of nan: they are not looked at before the launch."""
    B, H, T, D = x.shape
    y = torch.empty((B, T, H, D), dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(3) == 1 else x.contiguous()
        half, rest = cos.shape[1], D - 2 * cos.shape[1]
        _kernel[(triton.cdiv(B * T * H, BLOCK_R),)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            None if positions is None else positions.contiguous(),
            y,
            *x.stride()[:3],
            H,
            T,
            D,
            B * T * H,
            half,
            cos.shape[0],
            0 if positions is None or positions.numel() == T else T,
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            BLOCK_R=BLOCK_R,
            BLOCK_HALF=max(16, triton.next_power_of_2(half)),
            BLOCK_REST=max(16, triton.next_power_of_2(rest)) if rest else 0,
            num_warps=4,
        )
    return y.transpose(1, 2)


@triton.jit
def _kernel(
    x,
    cos,
    sin,
    positions,
    y,
    batch_stride,
    head_stride,
    token_stride,
    H,
    T,
    D,
    R,
    half,
    table_rows,
    position_stride,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    h, t, b = r % H, r // H % T, r // H // T
    place = t if positions is None else tl.load(positions + b * position_stride + t, r < R, other=0)
    known = (r < R) & (place >= 0) & (place < table_rows)
    source = x + (b * batch_stride + h * head_stride + t * token_stride)[:, None]
    target = y + (r * D)[:, None]
    c = tl.arange(0, BLOCK_HALF)[None, :]
    inside, readable = (r[:, None] < R) & (c < half), known[:, None] & (c < half)
    co = tl.load(cos + place[:, None] * half + c, readable, other=float("nan"))
    si = tl.load(sin + place[:, None] * half + c, readable, other=float("nan"))
    if INVERSE:
        si = -si
    first = 2 * c if INTERLEAVED else c
    second = 2 * c + 1 if INTERLEAVED else half + c
    u = tl.load(source + first, inside, other=0.0).to(tl.float32)
    v = tl.load(source + second, inside, other=0.0).to(tl.float32)
    tl.store(target + first, (u * co - v * si).to(y.dtype.element_ty), inside)
    tl.store(target + second, (v * co + u * si).to(y.dtype.element_ty), inside)
    if BLOCK_REST > 0:
        k = 2 * half + tl.arange(0, BLOCK_REST)[None, :]
        kept = (r[:, None] < R) & (k < D)
        tl.store(target + k, tl.load(source + k, kept, other=0.0), kept)
