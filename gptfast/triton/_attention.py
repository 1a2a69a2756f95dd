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

    left_pad: Tensor | None  # (B,)
    seq_lens: Tensor | None  # (B,)
    starts: Tensor | None  # (T,) of the document that a position lies in
    ends: Tensor | None  # (T,)


def common_arguments(q: Tensor, k: Tensor, options: AttentionOptions) -> dict[str, Any]:
    """The arguments that all kernels of a call have in common. GROUP query heads share a key head."""
    B, H, T, D = q.shape
    group = H // max(k.shape[1], 1)
    rows = (None if x is None else x.contiguous() for x in (options.left_pad, options.seq_lens))
    mask = Mask(*rows, *documents(options.cu_seqlens, T))
    dropout = dict(zip(DROPOUT, dropout_arguments(options.dropout_p, options.seed, options.offset), strict=True))
    sizes = {"heads": B * H, "H": H, "T": T, "S": k.shape[2], "GROUP": group, "D": D, "BLOCK_D": padded(D)}
    drops = dropout["threshold"] != 0
    variant = {"CAUSAL": options.causal, "WINDOW": options.window > 0, "DROP": drops, "CAP": options.softcap > 0}
    scales = {"scale": options.scale, "score_scale": score_scale(options)}
    scales["inner"] = options.scale / options.softcap if options.softcap else 0.0
    variant["DTYPE"] = product_dtype(q.dtype)
    return {**sizes, **scales, "mask": mask, "window": options.window, **dropout, **variant}


def score_scale(options: AttentionOptions) -> float:
    """Of the scores in kernels. With a soft cap they are tanh(inner q k^T), in units of the cap."""
    return options.softcap or options.scale


def shape_class(q: Tensor, common: dict[str, Any]) -> tuple[object, ...]:
    """What the best tile depends on; lengths rounded up to powers of two, since generation uses every length."""
    lengths = (triton.next_power_of_2(common[name]) for name in "TS")
    options = (common[name] for name in ("CAUSAL", "WINDOW", "DROP", "CAP", "GROUP"))
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
def visible_keys(i, T, S, left_pad, seq_len, mask, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """[first, end) of the keys that each query of i, all < T, may see."""
    first = tl.zeros_like(i) + left_pad
    end = tl.zeros_like(i) + tl.minimum(seq_len, S)
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
    """The first key of batch row b, and the end of its keys."""
    first, end = 0, S
    if mask.left_pad is not None:
        first = tl.maximum(tl.load(mask.left_pad + b).to(tl.int32), 0)
    if mask.seq_lens is not None:
        end = tl.load(mask.seq_lens + b).to(tl.int32)
    return first, end


@triton.jit
def keys_of_queries(
    i, b, T, S, mask, window, split, splits, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[first, end) of the keys that each query of i sees, and the edges (low, whole_low, whole_high, high) of this split's
    share of them: between the inner two every query sees every key. All edges but high are multiples of BLOCK_N."""
    left_pad, seq_len = keys_of_batch(mask, b, S)
    first, end = visible_keys(i, T, S, left_pad, seq_len, mask, window, CAUSAL, WINDOW)
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
def queries_of_keys(
    n0,
    j,
    T,
    S,
    left_pad,
    seq_len,
    mask,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The edges (low, whole_low, whole_high, high) of the queries that see any of the keys n0 … n0 + BLOCK_N - 1: between the
    inner two every query sees all of them. All edges but high are multiples of BLOCK_M."""
    low, high = tl.zeros_like(n0), T + tl.zeros_like(n0)
    whole_low, whole_high = low, high // BLOCK_M * BLOCK_M
    if CAUSAL:  # key j is seen from query j - (S - T) on
        low = tl.maximum(n0 - (S - T), 0)
        whole_low = tl.maximum(n0 + BLOCK_N - 1 - (S - T), 0)
    if WINDOW:  # and up to query j - (S - T) + window - 1
        high = tl.minimum(high, tl.maximum(n0 + BLOCK_N - 1 - (S - T) + window, 0))
        whole_high = tl.minimum(whole_high, tl.maximum(n0 - (S - T) + window, 0) // BLOCK_M * BLOCK_M)
    if mask.starts is not None:  # T = S: a key's document is that of the query at its position
        inside = tl.minimum(j, T - 1)
        start, end = tl.load(mask.starts + inside), tl.load(mask.ends + inside)
        low = tl.maximum(low, tl.min(tl.where(start < end, start, T), 0))
        high = tl.minimum(high, tl.max(end, 0))
        whole_high = tl.zeros_like(n0)
    high = tl.where((n0 < seq_len) & (n0 + BLOCK_N > left_pad), high, 0)
    whole_high = tl.where((n0 + BLOCK_N <= tl.minimum(seq_len, S)) & (n0 >= left_pad), whole_high, 0)
    low = low // BLOCK_M * BLOCK_M
    whole_low = tl.minimum(tl.cdiv(whole_low, BLOCK_M), tl.cdiv(high, BLOCK_M)) * BLOCK_M
    whole_low = tl.maximum(low, whole_low)
    return low, whole_low, tl.maximum(whole_low, whole_high), high


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


@triton.jit
def tanh(x):
    """Relative error below 2e-7: an odd polynomial (Cephes, tanhf) near 0, beyond 1 - 2 / (e^2|x| + 1)."""
    s, a = x * x, tl.abs(x)
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(a * (2.0 * LOG2E)) + 1.0)
    return tl.where(a < 0.625, p * s * x + x, tl.where(x < 0, -far, far))
