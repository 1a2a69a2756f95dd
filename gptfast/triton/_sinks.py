"""Attention sinks: a logit of each query head that takes part in its softmax as one more key, whose value is 0."""

from __future__ import annotations

import triton
import triton.language as tl

from gptfast.triton._attention import LOG2E


@triton.jit
def add_sink(top, total, sink, scale_log2):
    """(shift, level, factor): the statistics of a row whose scores have the maximum `top` and weights relative to it of the sum
    `total`, and whose sink joins them; what its weighted values are to be multiplied by. Without a key it has its sink alone."""
    blind = total == 0
    shift = tl.where(blind, 0.0, top)
    beyond = sink * LOG2E - shift * scale_log2
    lift = tl.maximum(beyond, tl.where(blind, -3.4e38, 0.0))
    fade = tl.where(blind, 0.0, tl.exp2(-lift))
    total = total * fade + tl.exp2(beyond - lift)
    nothing = total == 0
    return shift, tl.where(nothing, float("-inf"), tl.log2(total) + lift), tl.where(nothing, 0.0, fade / total)


@triton.jit
def dsinks_kernel(sinks, dsinks, shift, level, delta, B, H, T, score_scale, BLOCK: tl.constexpr):
    """-sum over the rows of a head of p_sink delta, one head a program."""
    head = tl.program_id(0)
    sink = tl.load(sinks + head) * LOG2E
    sums = tl.zeros((BLOCK,), tl.float32)
    for n0 in range(0, B * T, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        place = (n // T * H + head).to(tl.int64) * T + n % T
        levels = tl.load(level + place, n < B * T, other=float("-inf"))
        tops, deltas = tl.load(shift + place, n < B * T, other=0.0), tl.load(delta + place, n < B * T, other=0.0)
        seen = levels != float("-inf")
        weights = tl.exp2(sink - tops * (score_scale * LOG2E) - tl.where(seen, levels, 0.0))
        sums -= tl.where(seen, weights * deltas, 0.0)
    tl.store(dsinks + head, tl.sum(sums, 0))
