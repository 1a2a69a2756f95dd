"""What the forward and the backward kernels of attention share: which keys a query sees, tiles, sizes of blocks.

Every mask is an interval of keys for each query (see ops.causal_attention): causal, window, seq_lens and cu_seqlens only
move its ends. So the blocks that a block of queries meets are, from left to right, some masked ones, some that every query
sees whole, and some masked ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton import INTERPRETING

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a tile, warps, and stages of the loads' pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def float32_blocks(D: int) -> list[Blocks]:
    """Tensor cores do not take float32 (and TF32 would not be exact), so a thread unrolls m n D / (32 warps) multiply-adds
    for every product: larger tiles than these take minutes to compile."""
    if padded(D) <= 64:
        return [Blocks(64, 32, 8, 2)]
    return [Blocks(32, 32, 8, 1)] if padded(D) == 128 else [Blocks(16, 32, 8, 1)]


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def shape_class(q: Tensor, S: int, options: tuple[bool, ...]) -> tuple[object, ...]:
    """What the best tile depends on; lengths by powers of two, since generation meets every length."""
    T, D = q.shape[2:]
    return str(q.dtype), padded(D), triton.next_power_of_2(T), triton.next_power_of_2(S), *options


def heads_of(x: Tensor) -> Tensor:
    """x (B, H, T, D) with a contiguous last dimension."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def new_heads(like: Tensor) -> Tensor:
    """A fresh (B, H, T, D) stored as (B, T, H, D), the layout that the next projection reads without a copy."""
    B, H, T, D = like.shape
    return torch.empty((B, T, H, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the tensor cores multiply: the inputs' dtype, but float32 for bfloat16 in the interpreter, which errs there."""
    if dtype == torch.bfloat16:
        return tl.float32 if INTERPRETING else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def documents(cu_seqlens: Tensor | None, T: int) -> tuple[Tensor | None, Tensor | None]:
    """First position and end of the document that each of T positions lies in, (T,) int32; 0 and 0 outside of all."""
    if cu_seqlens is None:
        return None, None
    ends = cu_seqlens.contiguous()
    position = torch.arange(T, dtype=ends.dtype, device=ends.device)
    document = torch.searchsorted(ends, position, right=True)
    inside = document < ends.shape[0]
    document = document.clamp(1, ends.shape[0] - 1)
    first, end = (torch.where(inside, ends[document - n], 0).clamp(0, T) for n in (1, 0))
    return first.to(torch.int32), end.to(torch.int32)


@triton.jit
def visible_interval(i, T, S, seq_len, starts, ends, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[first, end) of the keys that each query of i, all < T, may see."""
    first = tl.zeros_like(i)
    end = first + tl.minimum(seq_len, S)
    if CAUSAL:
        end = tl.maximum(tl.minimum(end, i + (S - T) + 1), 0)
    if WINDOW:
        first = tl.maximum(first, i + (S - T) + 1 - window)
    if starts is not None:
        first = tl.maximum(first, tl.load(starts + i))
        end = tl.minimum(end, tl.load(ends + i))
    return first, end


@triton.jit
def keys_of_batch(seq_lens, b, S):
    """How many keys of batch row b count."""
    if seq_lens is None:
        return S
    else:
        return tl.load(seq_lens + b).to(tl.int32)


@triton.jit
def head_pointer(x, strides, head, H):
    """Start of matrix `head` (= b H + h)."""
    return x + (head // H).to(tl.int64) * strides[0] + (head % H).to(tl.int64) * strides[1]


@triton.jit
def load_tile(x, stride, t0, T, D: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows t0, t0 + 1, … of a matrix (T, D); past its end the last row again, past D zeros."""
    t, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = tl.cast(t0, tl.int64) * stride + tl.minimum(t, T - 1 - t0)[:, None] * stride + d[None, :]
    if D == COLUMNS:
        return tl.load(x + place).to(DTYPE)
    else:
        return tl.load(x + place, d[None, :] < D, other=0.0).to(DTYPE)


@triton.jit
def finite(x):
    """x with 0 in place of inf and nan, so that 0 times it is 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype)
