"""Causal attention, forward, by tiles with a running maximum and sum (Milakov and Gimelshein, arXiv 1805.02867; Dao et al.,
FlashAttention, arXiv 2205.14135). A program handles a block of queries of one head and loops over the blocks of keys.

With few queries and many keys (decoding with a cache) that leaves most of a GPU idle. The keys are then split among programs,
each of which stores its part of the result and its statistics, and a second kernel combines them (Flash-Decoding, Dao et
al., 2023).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast._schemas import AttentionOptions
from gptfast.triton._attention import (
    LOG2E,
    NOT_SPECIALIZED,
    common_arguments,
    finite,
    float32_blocks,
    heads,
    heads_of,
    keys_of_queries,
    load_tile,
    loadable_by_tma,
    new_heads,
    operand,
    padded,
    score_scale,
    shape_class,
    store_tile,
    tanh,
)
from gptfast.triton._philox import first_of, keep_mask
from gptfast.triton._sinks import add_sink
from gptfast.triton._tiles import Blocks
from gptfast.triton._tuning import fastest

FEW_QUERIES = 16
SPLIT_KEYS = 512  # keys of a split: a function of the shape of one sequence, so results do not depend on the batch
MOST_SPLITS = 32


def causal_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    S, given = k.shape[2], AttentionOptions(*options)
    sinks = None if given.sinks is None else given.sinks.contiguous()
    out, statistics = new_heads(q), torch.empty((2, B, H, T), dtype=torch.float32, device=q.device)
    if not statistics.numel():
        return out, statistics
    if not S:
        statistics[0] = 0.0
        statistics[1] = float("-inf") if sinks is None else sinks[:, None] * math.log2(math.e)
        return out.zero_(), statistics
    q, k, v = heads_of(q), heads_of(k), heads_of(v)
    splits = min(MOST_SPLITS, triton.cdiv(S, SPLIT_KEYS)) if T <= FEW_QUERIES else 1
    parts, part_statistics = out, statistics
    if splits > 1:
        parts = torch.empty((splits, B, H, T, D), dtype=torch.float32, device=q.device)
        part_statistics = torch.empty((2, splits, B, H, T), dtype=torch.float32, device=q.device)
    common = common_arguments(q, k, given)
    common["sinks"] = sinks if splits == 1 else None

    def launch(blocks: Blocks) -> None:
        operands = operand(q, blocks.m, blocks), operand(k, blocks.n, blocks), operand(v, blocks.n, blocks)
        grid = (triton.cdiv(T, blocks.m) * B * H * splits,)
        _fwd_kernel[grid](*operands, heads(parts), *part_statistics, splits=splits, **common, **blocks.options())

    candidates = block_candidates(D, q.dtype, T, loadable_by_tma(q, k, v))
    launch(fastest("causal_attention_fwd", shape_class(q, common), candidates, launch))
    if splits > 1:
        sizes = {"D": D, "BLOCK_S": MOST_SPLITS, "BLOCK_D": padded(D)}
        _join_kernel[(B * H * T,)](
            *(parts, *part_statistics, heads(out), *statistics, sinks, H, T, splits, score_scale(given)),
            **sizes,
            num_warps=4,
        )
    return out, statistics


def block_candidates(D: int, dtype: torch.dtype, T: int, tma: bool) -> list[Blocks]:
    """Candidates for `fastest`; all fit the shared memory of the GPUs that the tests compile for."""
    if dtype == torch.float32:
        found = float32_blocks(D)
    elif padded(D) <= 64:
        found = [Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 2), Blocks(64, 64, 4, 3)]
        found += [Blocks(128, 128, 8, 3, tma), Blocks(128, 64, 4, 3, tma)] if tma else []
    elif padded(D) == 128:
        found = [Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(128, 32, 4, 3)]
        found += [Blocks(128, 128, 8, 2, tma), Blocks(128, 64, 8, 3, tma)] if tma else []
    else:
        found = [Blocks(64, 32, 4, 2), Blocks(128, 32, 8, 2)]
        found += [Blocks(128, 64, 8, 2, tma)] if tma else []
    rows = max(16, triton.next_power_of_2(T))
    return list(dict.fromkeys(replace(b, m=min(b.m, rows)) for b in found))


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "splits"])
def _fwd_kernel(
    q,
    k,
    v,
    out,
    shift,
    level,
    sinks,
    heads,
    H,
    T,
    S,
    scale,
    score_scale,
    inner,
    mask,
    window,
    threshold,
    keep_scale,
    seed,
    offset,
    splits,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    DROP: tl.constexpr,
    CAP: tl.constexpr,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dropout = (threshold, keep_scale, seed, offset)
    head = tl.program_id(0) % heads
    split = tl.program_id(0) // heads % splits
    m0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // heads // splits) * BLOCK_M  # late queries see most keys: first
    row = m0 + tl.arange(0, BLOCK_M)
    i = tl.minimum(row, T - 1)  # past the end: the last query again, which is not stored
    queries = load_tile(q, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
    first, end, edges = keys_of_queries(i, head // H, T, S, mask, window, split, splits, CAUSAL, WINDOW, BLOCK_N)

    scale_log2 = tl.maximum(score_scale, 1e-30) * LOG2E  # above 0, as 0 times the -inf of masked scores is nan
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(
        0 if WINDOW or mask.starts is not None or mask.left_pad is not None else 1, 3
    ):  # masked, whole, masked
        for n0 in range(edges[part], edges[part + 1], BLOCK_N):
            keys = load_tile(k, head // GROUP, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            if CAP:
                scores = tanh(scores * inner)
            if part != 1:
                j = n0 + tl.arange(0, BLOCK_N)[None, :]
                visible = (j >= first[:, None]) & (j < end[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen no key yet
            p = tl.exp2(
                (scores - base[:, None]) * scale_log2
            )  # scaled later: the product of the maximum would be rounded
            shrink = tl.exp2((top - base) * scale_log2)
            top = higher
            total = total * shrink + tl.sum(p, 1)
            if DROP:
                p = tl.where(keep_mask(tl.cast(head, tl.uint32) + first_of(dropout), i, n0, dropout, BLOCK_N), p, 0.0)
            values = load_tile(v, head // GROUP, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
            acc = acc * shrink[:, None]
            if part != 1:
                acc += _infinities(values, visible)
                values = finite(values)
            acc = tl.dot(p.to(DTYPE), values, acc, input_precision="ieee")

    kept_scale = dropout[1] if DROP else 1.0
    if sinks is None:
        own_shift, own_level = tl.where(total == 0, 0.0, top), tl.where(total == 0, float("-inf"), tl.log2(total))
        factor = tl.where(total == 0, 0.0, kept_scale / total)
    else:
        own_shift, own_level, factor = add_sink(top, total, tl.load(sinks + head % H), scale_log2)
        factor = factor * kept_scale
    matrix = split * heads + head
    store_tile(out, matrix, H, m0, T, acc * factor[:, None], D)
    place = matrix.to(tl.int64) * T + row
    tl.store(shift + place, own_shift, row < T)
    tl.store(level + place, own_level, row < T)


@triton.jit
def _infinities(values, visible):
    """(queries, columns): inf or nan where a visible value is, else 0. Multiplied by p = 0 they would make other queries nan."""
    beyond = ~(tl.abs(values) < float("inf"))
    found = tl.zeros((visible.shape[0], values.shape[1]), tl.float32)
    if tl.max(tl.max(beyond.to(tl.int32), 1), 0) != 0:
        seen = visible.to(tl.float16)
        found = tl.where(tl.dot(seen, (values == float("inf")).to(tl.float16)) > 0, float("inf"), found)
        found += tl.where(tl.dot(seen, (values == float("-inf")).to(tl.float16)) > 0, float("-inf"), 0.0)
        found = tl.where(tl.dot(seen, (values != values).to(tl.float16)) > 0, float("nan"), found)
    return found


@triton.jit(do_not_specialize=["splits", "score_scale"])
def _join_kernel(
    parts,
    part_shift,
    part_level,
    out,
    shift,
    level,
    sinks,
    H,
    T,
    splits,
    score_scale,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum_s w_s parts_s / sum_s w_s,  w_s = exp2(scale log2(e) shift_s + level_s), for one query of one head a
    program."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    levels = tl.load(part_level + s * rows + row, s < splits, other=float("-inf"))
    tops = tl.load(part_shift + s * rows + row, s < splits, other=0.0)
    tops = tl.where(levels == float("-inf"), float("-inf"), tops)  # a part that saw no key
    top = tl.max(tops, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    scale_log2 = tl.maximum(score_scale, 1e-30) * LOG2E
    weights = tl.exp2((tops - base) * scale_log2 + levels)
    total = tl.sum(weights, 0)
    inside = (s[:, None] < splits) & (d[None, :] < D)
    values = tl.load(parts + (s[:, None] * rows + row) * D + d[None, :], inside, other=0.0)
    factor, joined_level = tl.where(total == 0, 0.0, 1.0 / total), tl.where(total == 0, float("-inf"), tl.log2(total))
    if sinks is not None:
        base, joined_level, factor = add_sink(base, total, tl.load(sinks + row // T % H), scale_log2)
    joined = tl.sum(values * weights[:, None], 0) * factor
    tl.store(shift + row, base)
    tl.store(level + row, joined_level)
    store_tile(out, (row // T).to(tl.int32), H, (row % T).to(tl.int32), T, joined[None, :], D)
