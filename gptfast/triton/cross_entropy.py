"""Cross-entropy of rows of logits: forward, backward, and both at once in place. A program handles a row.

    lse = m + s,  m = max_v x_v,  s = log sum_v exp(x_v - m)
    loss = (1 - e) (m - x_target + s) + e (m - mean_v x_v + s)      e: label smoothing
    dx_v = g (exp(x_v - m - s) - (1 - e) [v = target] - e / V)      g: gradient of this row's loss

m and s are stored separately: their sum would lose the small s of a confident row, or of one with a large common offset.
The maximum and the sum take one pass (Milakov and Gimelshein, arXiv 1805.02867). Targets are not checked before the launch,
which would wait for the GPU: a row whose target is outside the vocabulary gets loss and gradient nan.
Floor: one read of the logits forward, one read and one write backward; in place the second read comes from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.triton._rows import rows_of

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST_BLOCK = 4096


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    rows = rows_of(logits)
    loss, lse = _statistics_of(rows)
    _launch(rows, targets, loss, lse, None, None, ignore_index, label_smoothing)
    return loss, lse


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float
) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(rows_of(logits), targets, None, lse.contiguous(), dloss, dlogits, ignore_index, label_smoothing)
    return dlogits


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, dloss: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    """Loss of each row; its gradient overwrites the logits, (N, V) in contiguous rows."""
    loss, lse = _statistics_of(logits)
    _launch(logits, targets, loss, lse, dloss, logits, ignore_index, label_smoothing)
    return loss


def _statistics_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    R = rows.shape[0]
    return rows.new_empty(R, dtype=torch.float32), rows.new_empty((R, 2), dtype=torch.float32)


def _launch(
    rows: Tensor,
    targets: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    dloss: Tensor | None,
    dlogits: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """Forward if `loss` is given, then backward if `dlogits` is."""
    R, V = rows.shape
    if not R:
        return
    block = min(max(32, triton.next_power_of_2(V)), WIDEST_BLOCK)
    _kernel[(R,)](
        rows,
        targets.contiguous(),
        loss,
        lse,
        None if dloss is None else dloss.contiguous(),
        dlogits,
        rows.stride(0),
        rows.stride(0) if dlogits is rows else V,
        V,
        ignore_index,
        label_smoothing,
        SMOOTH=label_smoothing != 0,
        BLOCK_V=block,
        num_warps=8 if block > 1024 else 4,
    )


@triton.jit(do_not_specialize=["ignore_index"])
def _kernel(
    x,
    targets,
    loss,
    lse,
    dloss,
    dx,
    x_stride,
    dx_stride,
    V,
    ignore_index,
    smoothing,
    SMOOTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    if loss is not None:
        top, log_total = _forward_row(x, targets, loss, lse, x_stride, V, ignore_index, smoothing, SMOOTH, BLOCK_V)
        tl.debug_barrier()  # in place: every thread has read the target's logit before it is overwritten
    else:
        r = tl.program_id(0).to(tl.int64)
        top, log_total = tl.load(lse + 2 * r), tl.load(lse + 2 * r + 1)
    if dx is not None:
        _backward_row(x, targets, dloss, dx, top, log_total, x_stride, dx_stride, V, ignore_index, smoothing, BLOCK_V)


@triton.jit
def _forward_row(
    x, targets, loss, lse, x_stride, V, ignore_index, smoothing, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Stores loss, m and s of this program's row; returns m and s."""
    r = tl.program_id(0).to(tl.int64)
    row = x + r * x_stride
    target = tl.load(targets + r)
    counts = target != ignore_index
    known = (target >= 0) & (target < V)
    top, total, log_total = float("-inf"), 0.0, 0.0  # of an ignored row: 0, 0, 0
    origin, shifted = 0.0, 0.0  # a number near the logits, and the sum of x - origin
    if counts:
        for v0 in range(0, V, BLOCK_V):
            v = v0 + tl.arange(0, BLOCK_V)
            values = tl.load(row + v, v < V, other=float("-inf")).to(tl.float32)
            high = tl.maximum(top, tl.max(values, 0))
            level = tl.where(high == float("-inf"), 0.0, high)
            total = total * tl.exp2((top - level) * LOG2E) + tl.sum(tl.exp2((values - level) * LOG2E), 0)
            top = high
            if SMOOTH:
                origin = tl.where(v0 == 0, level, origin)
                shifted += tl.sum(tl.where(v < V, values - origin, 0.0), 0)
        log_total = tl.log(total)
        picked = tl.load(row + target, known, other=float("nan")).to(tl.float32)
        value = (1.0 - smoothing) * (top - picked + log_total)
        if SMOOTH:
            value += smoothing * (top - origin - shifted / V + log_total)
        log_total = tl.where(known, log_total, float("nan"))
        tl.store(loss + r, tl.where(known, value, float("nan")))
    else:
        top = 0.0
        tl.store(loss + r, 0.0)
    tl.store(lse + 2 * r, top)
    tl.store(lse + 2 * r + 1, log_total)
    return top, log_total


@triton.jit
def _backward_row(
    x, targets, dloss, dx, top, log_total, x_stride, dx_stride, V, ignore_index, smoothing, BLOCK_V: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    row, out = x + r * x_stride, dx + r * dx_stride
    target = tl.load(targets + r)
    counts = target != ignore_index
    g = 1.0 if dloss is None else tl.load(dloss + r)
    even, at_target = g * smoothing / V, g * (1.0 - smoothing)
    for v0 in range(0, V, BLOCK_V):
        v = v0 + tl.arange(0, BLOCK_V)
        values = tl.load(row + v, v < V, other=float("-inf")).to(tl.float32)
        p = tl.exp2((values - top) * LOG2E - log_total * LOG2E)
        slope = p * g - even - tl.where(v == target, at_target, 0.0)
        slope = tl.where(counts, slope, 0.0)  # an ignored row may hold anything
        tl.store(out + v, slope.to(dx.dtype.element_ty), v < V)
