"""max(x, 0)^2, forward and backward (So et al., arXiv 2109.08668).

Floor: one read and one write forward, two reads and one write backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._rows import rows_of

BLOCK_R, BLOCK_C = 4, 512


def relu_squared_fwd(x: Tensor) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _launch(None, rows_of(x), y)
    return y


def relu_squared_bwd(dout: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _launch(rows_of(dout), rows_of(x), dx)
    return dx


def _launch(dout: Tensor | None, x: Tensor, out: Tensor) -> None:
    R, C = x.shape
    grid = (triton.cdiv(R, BLOCK_R) * triton.cdiv(C, BLOCK_C),)
    strides = 0 if dout is None else dout.stride(0), x.stride(0)
    _kernel[grid](dout, x, out, *strides, R, C, BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4)


@triton.jit
def _kernel(dout, x, out, dout_stride, x_stride, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    column_blocks = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0) // column_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (r[:, None] < R) & (c[None, :] < C)
    r64 = r.to(tl.int64)[:, None]
    v = tl.load(x + r64 * x_stride + c[None, :], inside, other=0.0).to(tl.float32)
    v = tl.where(v < 0, 0.0, v)  # nan stays
    if dout is None:
        v = v * v
    else:
        v = (v + v) * tl.load(dout + r64 * dout_stride + c[None, :], inside, other=0.0).to(tl.float32)
    tl.store(out + r64 * C + c[None, :], v.to(out.dtype.element_ty), inside)
