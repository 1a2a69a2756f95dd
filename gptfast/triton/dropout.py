"""Dropout along rows: y = x / (1 - p) where the Philox contract keeps an element, 0 elsewhere, also for nan."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._philox import dropout_arguments, first_of, keep_mask
from gptfast.triton._rows import rows_of

BLOCK_R, BLOCK_C = 4, 512


def dropout(x: Tensor, p: float, seed: int, offset: int) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not x.numel():
        return y
    rows = rows_of(x)
    R, C = rows.shape
    drop = dropout_arguments(p, seed, offset)
    grid = (triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)
    _dropout_kernel[grid](rows, y, rows.stride(0), R, C, *drop, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4)
    return y


@triton.jit(do_not_specialize=["threshold", "keep_scale", "seed", "offset"])
def _dropout_kernel(
    x, y, x_stride, R, C, threshold, keep_scale, seed, offset, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    dropout = (threshold, keep_scale, seed, offset)
    column_blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c0 = tl.program_id(0) % column_blocks * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    inside = (r[:, None] < R) & (c[None, :] < C)
    r64 = r.to(tl.int64)[:, None]
    values = tl.load(x + r64 * x_stride + c[None, :], inside, other=0.0).to(tl.float32)
    keep = keep_mask(0, r.to(tl.uint32) + first_of(dropout), c0, dropout, BLOCK_C)
    tl.store(y + r64 * C + c[None, :], tl.where(keep, values * dropout[1], 0.0).to(y.dtype.element_ty), inside)
