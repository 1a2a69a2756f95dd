"""wte[ids] + wpe[positions], and the gradient of a table.

Ids are not checked before the launch, which would wait for the GPU: an id outside its table gives a row of nan. In
backward a program handles one row of the table and a block of columns, and adds the gradients in the order of the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._rows import rows_of

BLOCK_N, BLOCK_C = 16, 128


def embedding_fwd(ids: Tensor, wte: Tensor, wpe: Tensor | None, positions: Tensor | None) -> Tensor:
    C = wte.shape[1]
    out = torch.empty((*ids.shape, C), dtype=wte.dtype, device=wte.device)
    if out.numel():
        _fwd_kernel[(ids.numel() * triton.cdiv(C, BLOCK_C),)](
            ids.contiguous(),
            wte.contiguous(),
            None if wpe is None else wpe.contiguous(),
            None if positions is None else positions.contiguous(),
            out,
            ids.shape[-1] if ids.dim() else 1,
            C,
            wte.shape[0],
            0 if wpe is None else wpe.shape[0],
            BLOCK_C=BLOCK_C,
            num_warps=1,
        )
    return out


def embedding_bwd(dout: Tensor, keys: Tensor, order: Tensor, table: Tensor) -> Tensor:
    """keys: the sorted ids; order: the row of dout of each, ascending among equal ids."""
    V, C = table.shape
    dtable = torch.empty((V, C), dtype=table.dtype, device=table.device)
    if dtable.numel():
        rows = rows_of(dout) if dout.numel() else dout.reshape(0, C)
        starts = torch.searchsorted(keys, torch.arange(V + 1, device=keys.device))
        _bwd_kernel[(V * triton.cdiv(C, BLOCK_C),)](
            rows, starts, order.contiguous(), dtable, rows.stride(0), C, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=4
        )
    return dtable


@triton.jit
def _fwd_kernel(ids, wte, wpe, positions, out, T, C, V, P, BLOCK_C: tl.constexpr):
    column_blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // column_blocks).to(tl.int64)
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(ids + n)
    values = _row_or_nan(wte, row, V, c, C)
    if wpe is not None:
        place = n % T if positions is None else tl.load(positions + n)
        values += _row_or_nan(wpe, place, P, c, C)
    tl.store(out + n * C + c, values.to(out.dtype.element_ty), c < C)


@triton.jit
def _row_or_nan(table, row, rows, c, C):
    known = tl.where((row >= 0) & (row < rows), C, 0)  # how many of its columns may be read
    return tl.load(table + row * C + c, c < known, other=float("nan")).to(tl.float32)


@triton.jit
def _bwd_kernel(dout, starts, order, dtable, dout_stride, C, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    column_blocks = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // column_blocks).to(tl.int64)
    c = tl.program_id(0) % column_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    end = tl.load(starts + row + 1)
    for n0 in range(tl.load(starts + row), end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        place = tl.load(order + n, n < end, other=0)
        inside = (n[:, None] < end) & (c[None, :] < C)
        total += tl.load(dout + place[:, None] * dout_stride + c[None, :], inside, other=0.0).to(tl.float32)
    tl.store(dtable + row * C + c, tl.sum(total, 0).to(dtable.dtype.element_ty), c < C)
