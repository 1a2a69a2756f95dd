"""Shared by the forward and backward kernels of attention: arguments, the keys that a query sees, tiles.

Every mask is an interval of keys for each query (see ops.causal_attention): causal, window, seq_lens and cu_seqlens only
move its ends. The blocks of keys of a block of queries are therefore, from left to right: partly masked, fully visible,
partly masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from gptfast._schemas import AttentionOptions
from gptfast.triton import INTERPRETING
from gptfast.triton._philox import dropout_arguments
from gptfast.triton._tiles import Blocks, product_dtype

LOG2E = tl.constexpr(1.4426950408889634)
DROPOUT = ("threshold", "keep_scale", "seed", "offset")
NOT_SPECIALIZED = ["window", *DROPOUT]  # one compilation of a kernel serves all values


class Heads(NamedTuple):
    """A tensor (B, H, T, D) in kernels: its data, and the strides of B, H and T."""

    data: Tensor
    b: int
    h: int
    t: int


class Mask(NamedTuple):
    """The tensors that limit the interval of keys that a query sees; causality and the window are scalars."""

    seq_lens: Tensor | None  # (B,)
    starts: Tensor | None  # (T,) of the document that a position lies in
    ends: Tensor | None  # (T,)


def common_arguments(q: Tensor, k: Tensor, options: AttentionOptions) -> dict[str, Any]:
    """The arguments that all kernels of a call have in common. GROUP query heads share a key head."""
    B, H, T, D = q.shape
    group = H // max(k.shape[1], 1)
    seq_lens = None if options.seq_lens is None else options.seq_lens.contiguous()
    mask = Mask(seq_lens, *documents(options.cu_seqlens, T))
    dropout = dict(zip(DROPOUT, dropout_arguments(options.dropout_p, options.seed, options.offset), strict=True))
    sizes = {"heads": B * H, "H": H, "T": T, "S": k.shape[2], "GROUP": group, "D": D, "BLOCK_D": padded(D)}
    drops = dropout["threshold"] != 0
    variant = {"CAUSAL": options.causal, "WINDOW": options.window > 0, "DROP": drops, "DTYPE": product_dtype(q.dtype)}
    return {**sizes, "scale": options.scale, "mask": mask, "window": options.window, **dropout, **variant}


def shape_class(q: Tensor, common: dict[str, Any]) -> tuple[object, ...]:
    """What the best tile depends on; lengths rounded up to powers of two, since generation uses every length."""
    lengths = (triton.next_power_of_2(common[name]) for name in "TS")
    options = (common[name] for name in ("CAUSAL", "WINDOW", "DROP", "GROUP"))
    return str(q.dtype), common["BLOCK_D"], *lengths, *options


def float32_blocks(D: int) -> list[Blocks]:
    """Tensor cores do not take float32 (and TF32 would not be exact), so a thread unrolls m n D / (32 warps) multiply-adds
    for every product: larger tiles than these take minutes to compile."""
    if padded(D) <= 64:
        return [Blocks(64, 32, 8, 2)]
    return [Blocks(32, 32, 8, 1)] if padded(D) == 128 else [Blocks(16, 32, 8, 1)]


def padded(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def heads_of(x: Tensor) -> Tensor:
    """x (B, H, T, D) with a contiguous last dimension."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def new_heads(like: Tensor) -> Tensor:
    """A fresh (B, H, T, D) stored as (B, T, H, D), the layout that the next projection reads without a copy."""
    B, H, T, D = like.shape
    return torch.empty((B, T, H, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def heads(x: Tensor) -> Heads:
    return Heads(x, *x.stride()[-4:-1])


def operand(x: Tensor, rows: int, blocks: Blocks) -> Heads | TensorDescriptor:
    """x (B, H, T, D) as `load_tile` takes it for tiles of `rows` rows."""
    if not blocks.tma:
        return heads(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, padded(x.shape[3])])


def loadable_by_tma(*tensors: Tensor) -> bool:
    """16-bit tensors whose addresses and strides are multiples of 16 bytes (CUDA driver API, cuTensorMapEncodeTiled), on
    a GPU that has the Tensor Memory Accelerator."""

    def aligned(x: Tensor) -> bool:
        strides = x.stride()
        return x.data_ptr() % 16 == 0 and strides[3] == 1 and all(s > 0 and s * 2 % 16 == 0 for s in strides[:3])

    return has_tma() and all(x.element_size() == 2 and aligned(x) for x in tensors)


def has_tma() -> bool:
    if INTERPRETING:
        return False
    target = driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


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
def visible_keys(i, T, S, seq_len, mask, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[first, end) of the keys that each query of i, all < T, may see."""
    first = tl.zeros_like(i)
    end = first + tl.minimum(seq_len, S)
    if CAUSAL:
        end = tl.maximum(tl.minimum(end, i + (S - T) + 1), 0)
    if WINDOW:
        first = tl.maximum(first, i + (S - T) + 1 - window)
    if mask.starts is not None:
        first = tl.maximum(first, tl.load(mask.starts + i))
        end = tl.minimum(end, tl.load(mask.ends + i))
    return first, end


@triton.jit
def keys_of_batch(mask, b, S):
    """The number of keys of batch row b."""
    if mask.seq_lens is None:
        return S
    else:
        return tl.load(mask.seq_lens + b).to(tl.int32)


@triton.jit
def keys_of_queries(
    i, b, T, S, mask, window, split, splits, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[first, end) of the keys that each query of i sees, and the edges (low, whole_low, whole_high, high) of this split's
    share of them: between the inner two every query sees every key. All edges but high are multiples of BLOCK_N."""
    first, end = visible_keys(i, T, S, keys_of_batch(mask, b, S), mask, window, CAUSAL, WINDOW)
    low = tl.min(tl.where(first < end, first, S), 0) // BLOCK_N * BLOCK_N
    high = tl.max(end, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_N), splits) * BLOCK_N
    low += split * share
    high = tl.minimum(high, low + share)
    whole_low = tl.maximum(low, tl.cdiv(tl.max(first, 0), BLOCK_N) * BLOCK_N)
    whole_low = tl.minimum(whole_low, tl.cdiv(high, BLOCK_N) * BLOCK_N)
    whole_high = tl.maximum(whole_low, tl.minimum(high, tl.min(end, 0)) // BLOCK_N * BLOCK_N)
    return first, end, (low, whole_low, whole_high, high)


@triton.jit
def load_tile(x, head, H, t0, T, D: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows t0, t0 + 1, … of matrix `head` (= b H + h) of an operand; past D zeros; past the end the last row again, or by
    TMA zeros."""
    if isinstance(x, tl.tensor_descriptor):
        return x.load([head // H, head % H, t0, 0]).reshape(ROWS, COLUMNS).to(DTYPE)
    else:
        t, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        place = tl.cast(t0, tl.int64) * x.t + tl.minimum(t, T - 1 - t0)[:, None] * x.t + d[None, :]
        if D == COLUMNS:
            return tl.load(_matrix(x, head, H) + place).to(DTYPE)
        else:
            return tl.load(_matrix(x, head, H) + place, d[None, :] < D, other=0.0).to(DTYPE)


@triton.jit
def store_tile(x, head, H, t0, T, values, D: tl.constexpr):
    """The inverse of load_tile: rows past T and columns past D are left out."""
    t, d = t0 + tl.arange(0, values.shape[0]), tl.arange(0, values.shape[1])
    place = t.to(tl.int64)[:, None] * x.t + d[None, :]
    inside = (t[:, None] < T) & (d[None, :] < D)
    tl.store(_matrix(x, head, H) + place, values.to(x.data.dtype.element_ty), inside)


@triton.jit
def _matrix(x, head, H):
    return x.data + (head // H).to(tl.int64) * x.b + (head % H).to(tl.int64) * x.h


@triton.jit
def finite(x):
    """x with 0 in place of inf and nan, so that 0 times it is 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype)
