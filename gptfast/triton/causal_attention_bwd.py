"""Causal attention, backward, in two kernels without atomics, so that gradients repeat bit for bit.

    P = exp2(c (Q K^T - shift) - level),  dP = dO V^T,  dS = P (dP - delta),  delta = rowsum(dO O)
    dQ = scale dS K       a program handles a block of queries and loops over its keys; it also stores delta
    dK = scale dS^T Q     a program handles a block of keys and loops over the queries that see them, of one query head of
    dV = P^T dO           the key head's group after another

With a soft cap the scores are tanh(inner Q K^T), c that of the cap, and dS has the factor 1 - tanh^2. The sink of a head has the
weight p_i = exp2(sink log2(e) - c shift - level) in row i and the value 0: dsink = -sum_i p_i delta_i.

(Dao, FlashAttention-2, arXiv 2307.08691). With dropout, P in dV and dP in dS go through the mask, which is recomputed.
"""

from __future__ import annotations

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
    keys_of_batch,
    keys_of_queries,
    load_tile,
    loadable_by_tma,
    new_heads,
    operand,
    padded,
    queries_of_keys,
    score_scale,
    shape_class,
    store_tile,
    tanh,
    visible_keys,
)
from gptfast.triton._philox import first_of, keep_bits, keep_mask
from gptfast.triton._sinks import dsinks_kernel
from gptfast.triton._tiles import Blocks
from gptfast.triton._tuning import fastest


def causal_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    S, given = k.shape[2], AttentionOptions(*options)
    dq, dk, dv = new_heads(q), new_heads(k), new_heads(k)
    dsinks = q.new_zeros(0 if given.sinks is None else H, dtype=torch.float32)
    if not (B * H * T and S):
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks
    q, k, v, out, dout = (heads_of(x) for x in (q, k, v, out, dout))
    rows = *statistics.contiguous(), torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    common = common_arguments(q, k, given)

    def launch_dq(blocks: Blocks) -> None:
        operands = [operand(x, blocks.m, blocks) for x in (q, dout, out)]
        operands += [operand(x, blocks.n, blocks) for x in (k, v)]
        grid = (triton.cdiv(T, blocks.m) * B * H,)
        _dq_kernel[grid](*operands, heads(dq), *rows, **common, **blocks.options())

    def launch_dkdv(blocks: Blocks) -> None:
        operands = [operand(x, blocks.m, blocks) for x in (q, dout)]
        operands += [operand(x, blocks.n, blocks) for x in (k, v)]
        grid = (triton.cdiv(S, blocks.n) * B * k.shape[1],)
        _dkdv_kernel[grid](*operands, heads(dk), heads(dv), *rows, **common, **blocks.options())

    kind, tma = shape_class(q, common), loadable_by_tma(q, k, v, out, dout)
    launch_dq(fastest("causal_attention_bwd_dq", kind, dq_candidates(D, q.dtype, tma), launch_dq))
    launch_dkdv(fastest("causal_attention_bwd_dkdv", kind, dkdv_candidates(D, q.dtype, tma), launch_dkdv))
    if given.sinks is not None:
        dsinks_kernel[(H,)](given.sinks.contiguous(), dsinks, *rows, B, H, T, score_scale(given), BLOCK=1024)
    return dq, dk, dv, dsinks


def dq_candidates(D: int, dtype: torch.dtype, tma: bool) -> list[Blocks]:
    """Candidates for `fastest`."""
    if dtype == torch.float32:
        return float32_blocks(D)
    if padded(D) <= 64:
        found = [Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 3)]
        return found + ([Blocks(128, 64, 8, 3, tma)] if tma else [])
    if padded(D) == 128:
        found = [Blocks(64, 64, 4, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 1)]  # the last: 99 KB, of sm_86
        return found + ([Blocks(128, 64, 8, 2, tma)] if tma else [])
    return [Blocks(64, 32, 4, 1)]


def dkdv_candidates(D: int, dtype: torch.dtype, tma: bool) -> list[Blocks]:
    if dtype == torch.float32:
        return float32_blocks(D)
    if padded(D) <= 64:
        found = [Blocks(64, 128, 8, 2), Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 3)]
        return found + ([Blocks(64, 128, 8, 3, tma)] if tma else [])
    if padded(D) == 128:
        found = [Blocks(64, 64, 4, 2), Blocks(32, 128, 8, 2), Blocks(32, 64, 4, 1)]
        return found + ([Blocks(64, 128, 8, 2, tma)] if tma else [])
    return [Blocks(32, 64, 4, 1)]


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _dq_kernel(
    q,
    dout,
    out,
    k,
    v,
    dq,
    shift,
    level,
    delta,
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
    m0 = (tl.cdiv(T, BLOCK_M) - 1 - tl.program_id(0) // heads) * BLOCK_M  # late queries see most: first
    row = m0 + tl.arange(0, BLOCK_M)
    i = tl.minimum(row, T - 1)  # past the end the last query again, which is not stored
    queries = load_tile(q, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
    upstream = load_tile(dout, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
    result = load_tile(out, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
    own = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + head.to(tl.int64) * T + row, own, row < T)
    tops = tl.load(shift + head.to(tl.int64) * T + i)[:, None]
    levels = tl.load(level + head.to(tl.int64) * T + i)[:, None]
    first, end, edges = keys_of_queries(i, head // H, T, S, mask, window, 0, 1, CAUSAL, WINDOW, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in tl.static_range(
        0 if WINDOW or mask.starts is not None or mask.left_pad is not None else 1, 3
    ):  # masked, whole, masked
        for n0 in range(edges[part], edges[part + 1], BLOCK_N):
            keys = load_tile(k, head // GROUP, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
            values = load_tile(v, head // GROUP, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            if CAP:
                scores = tanh(scores * inner)
            p = tl.exp2((scores - tops) * (score_scale * LOG2E) - levels)
            dp = tl.dot(upstream, tl.trans(values), input_precision="ieee")
            if DROP:
                dp = tl.where(
                    keep_mask(tl.cast(head, tl.uint32) + first_of(dropout), i, n0, dropout, BLOCK_N),
                    dp * dropout[1],
                    0.0,
                )
            ds = p * (dp - own[:, None])
            if CAP:
                ds = ds * (1.0 - scores * scores)
            if part != 1:
                j = n0 + tl.arange(0, BLOCK_N)[None, :]
                ds = tl.where((j >= first[:, None]) & (j < end[:, None]), ds, 0.0)
                keys = finite(keys)
            acc = tl.dot(ds.to(DTYPE), keys, acc, input_precision="ieee")
    store_tile(dq, head, H, m0, T, acc * scale, D)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def _dkdv_kernel(
    q,
    dout,
    k,
    v,
    dk,
    dv,
    shift,
    level,
    delta,
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
    key_heads = heads // GROUP
    key_head = tl.program_id(0) % key_heads
    n0 = tl.program_id(0) // key_heads * BLOCK_N  # early keys are seen by the most queries: first
    j = n0 + tl.arange(0, BLOCK_N)
    keys = load_tile(k, key_head, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
    values = load_tile(v, key_head, H // GROUP, n0, S, D, DTYPE, BLOCK_N, BLOCK_D)
    left_pad, seq_len = keys_of_batch(mask, key_head // (H // GROUP), S)
    edges = queries_of_keys(n0, j, T, S, left_pad, seq_len, mask, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)

    key_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    value_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        tops = shift + head.to(tl.int64) * T
        levels = level + head.to(tl.int64) * T
        deltas = delta + head.to(tl.int64) * T
        for part in tl.static_range(0, 3):  # masked, whole, masked
            for m0 in range(edges[part], edges[part + 1], BLOCK_M):
                row = m0 + tl.arange(0, BLOCK_M)
                i = tl.minimum(row, T - 1)
                queries = load_tile(q, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
                upstream = load_tile(dout, head, H, m0, T, D, DTYPE, BLOCK_M, BLOCK_D)
                scores = tl.dot(keys, tl.trans(queries), input_precision="ieee")  # BLOCK_N, BLOCK_M
                if CAP:
                    scores = tanh(scores * inner)
                p = tl.exp2(
                    (scores - tl.load(tops + i)[None, :]) * (score_scale * LOG2E) - tl.load(levels + i)[None, :]
                )
                dp = tl.dot(values, tl.trans(upstream), input_precision="ieee")
                if part != 1:
                    first, end = visible_keys(i, T, S, left_pad, seq_len, mask, window, CAUSAL, WINDOW)
                    end = tl.where(row < T, end, 0)  # past the end of the queries nothing is seen
                    visible = (j[:, None] >= first[None, :]) & (j[:, None] < end[None, :])
                    p = tl.where(visible, p, 0.0)
                kept = p
                if DROP:
                    keep = tl.trans(keep_bits(tl.cast(head, tl.uint32) + first_of(dropout), i, n0, dropout, BLOCK_N))
                    kept = _select(keep, p * dropout[1])
                    dp = _select(keep, dp * dropout[1])
                ds = p * (dp - tl.load(deltas + i)[None, :])
                if CAP:
                    ds = ds * (1.0 - scores * scores)
                if part != 1:
                    ds = tl.where(visible, ds, 0.0)  # p = 0 times a bad value
                value_sum = tl.dot(kept.to(DTYPE), upstream, value_sum, input_precision="ieee")
                key_sum = tl.dot(ds.to(DTYPE), queries, key_sum, input_precision="ieee")
    store_tile(dk, key_head, H // GROUP, n0, S, key_sum * scale, D)
    store_tile(dv, key_head, H // GROUP, n0, S, value_sum, D)


@triton.jit
def _select(keep, x):
    """x where all bits of `keep` are set, 0 where none is."""
    return (x.to(tl.int32, bitcast=True) & keep).to(tl.float32, bitcast=True)
