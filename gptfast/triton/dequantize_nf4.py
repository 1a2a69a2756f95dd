"""NF4 (Dettmers et al., arXiv 2305.14314) to floats: value of the code times the scale of its block.

Floor: half a byte of reading and one write a value; the scales are 1/32 of that.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast._nf4 import NESTED_BLOCK
from gptfast.triton._codes import dynamic_table, nf4_table, unpack_pairs

BLOCK = 2048


def dequantize_nf4(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    numel = math.prod(shape)
    if numel:
        _kernel[(triton.cdiv(numel, BLOCK),)](
            codes.contiguous(),
            absmax.contiguous(),
            None if nested_absmax is None else nested_absmax.contiguous(),
            offset,
            nf4_table(codes.device),
            dynamic_table(codes.device),
            out,
            numel,
            BLOCK_SIZE=block_size,
            NESTED_BLOCK=NESTED_BLOCK,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return out


@triton.jit
def _kernel(
    codes,
    absmax,
    nested_absmax,
    offset,
    table,
    dynamic,
    out,
    numel,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    pair = first // 2 + tl.arange(0, BLOCK // 2)
    code = unpack_pairs(tl.load(codes + pair, 2 * pair < numel, other=0))
    n = first + tl.arange(0, BLOCK)
    block = n // BLOCK_SIZE
    scale = tl.load(absmax + block, n < numel, other=0)
    if nested_absmax is not None:
        nested = tl.load(nested_absmax + block // NESTED_BLOCK, n < numel, other=0.0)
        scale = tl.load(dynamic + scale.to(tl.int32)) * nested + tl.load(offset)
    value = tl.load(table + code.to(tl.int32)) * scale
    tl.store(out + n, value.to(out.dtype.element_ty), n < numel)
