"""Helpers of the kernels over rows: a view of any tensor as rows, sizes of blocks, and sums over rows in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST_ROW = 131072  # values that one program keeps in registers
PARTIAL_SUMS = 512  # rows of a sum's first stage: enough for every GPU, few enough to add up at once


def rows_of(x: Tensor) -> Tensor:
    """x (..., C) as (R, C) with contiguous rows; a copy only if the rows have no common stride."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def row_block(op: str, C: int, elements: int = 2048) -> tuple[int, int]:
    """(rows, columns) of a block that holds whole rows of C values."""
    if C > WIDEST_ROW:
        raise ValueError(
            f"{op}: backend='triton' takes rows of at most {WIDEST_ROW} values, got {C}; use backend='eager'"
        )
    columns = max(32, triton.next_power_of_2(C))
    return max(1, min(elements // columns, 16)), columns


def warps_for(elements: int) -> int:
    """Warps for a block of `elements` values: 16 values a thread, up to 512 threads."""
    return max(1, min(16, triton.next_power_of_2(elements // 512)))


def rows_per_program(R: int, block: int) -> int:
    """Rows that one program of a column sum adds: a function of R alone, so results do not depend on the GPU."""
    return max(16, block, triton.next_power_of_2(triton.cdiv(R, PARTIAL_SUMS)))


def sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, C) float32 -> (C,): the second stage, in the order of P."""
    P, C = partial.shape
    out = partial.new_empty(C, dtype=dtype)
    if C:
        _sum_rows_kernel[(triton.cdiv(C, 64),)](partial, out, P, C, BLOCK_P=32, BLOCK_C=64, num_warps=4)
    return out


@triton.jit
def _sum_rows_kernel(partial, out, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        total += tl.load(partial + p[:, None] * C + c[None, :], (p[:, None] < P) & (c[None, :] < C), other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), c < C)


@triton.jit
def load_vector(vector, c, C):
    """Values c of a vector of C as float32; 0 past its end, and if `vector` is None."""
    if vector is None:
        return tl.zeros_like(c).to(tl.float32)
    else:
        return tl.load(vector + c, c < C, other=0.0).to(tl.float32)
