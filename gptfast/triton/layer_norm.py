"""LayerNorm (Ba et al., arXiv 1607.06450), alone or after dropout and a residual sum, forward and backward. The same kernels
without a mean are RMSNorm (gptfast/triton/rms_norm.py).

    total = dropout(x) + residual                                     (add_layer_norm only)
    y = (total - mean) rstd weight + bias,   rstd = 1 / sqrt(var + eps)
    dtotal += rstd (g - mean(g) - xhat mean(g xhat)),  g = dy weight,  xhat = (total - mean) rstd
    dweight = sum_rows dy xhat,  dbias = sum_rows dy

A program holds whole rows in registers, so the second pass that computes the variance around the mean is free. It also
corrects the mean: in a row far from 0 the rounding of the first sum may exceed the spread of the row.
Floor: one read and one write forward (with a residual two and two), two reads and one write backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES
from gptfast.triton._philox import dropout_arguments, first_of, keep_mask
from gptfast.triton._rows import load_vector, row_block, rows_of, rows_per_program, sum_rows, warps_for

NO_DROPOUT = (0, 1.0, 0, 0)


def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, y_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=KERNEL_DTYPES[y_type], device=x.device)
    return y, *forward("layer_norm", x, None, weight, bias, None, y, eps, NO_DROPOUT)


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    offset: int,
    y_type: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if x.dtype == residual.dtype else torch.float32
    y, total = (torch.empty(x.shape, dtype=kind, device=x.device) for kind in (KERNEL_DTYPES[y_type], dtype))
    dropout = dropout_arguments(dropout_p, seed, offset)
    return y, total, *forward("add_layer_norm", x, residual, weight, bias, total, y, eps, dropout)


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, bias_type: int
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *backward("layer_norm", dy, None, x, weight, mean, rstd, bias_type, dx, None, NO_DROPOUT)


def add_layer_norm_bwd(
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_type: int,
    x_type: int,
    residual_type: int,
    dropout_p: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx is empty if it would equal dresidual: without dropout and with x_type == residual_type."""
    dropout = dropout_arguments(dropout_p, seed, offset)
    own_dx = dropout[0] != 0 or x_type != residual_type
    dresidual = torch.empty(total.shape, dtype=KERNEL_DTYPES[residual_type], device=total.device)
    dx = torch.empty(total.shape if own_dx else 0, dtype=KERNEL_DTYPES[x_type], device=total.device)
    dweight, dbias = backward(
        "add_layer_norm",
        dy,
        dtotal,
        total,
        weight,
        mean,
        rstd,
        bias_type,
        dresidual,
        dx if own_dx else None,
        dropout,
    )
    return dx, dresidual, dweight, dbias


def forward(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    eps: float,
    dropout: tuple[int, float, int, int],
    centered: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Fills total and y; returns mean (None for RMSNorm, which is not centered) and rstd."""
    rows, others = rows_of(x), None if residual is None else rows_of(residual)
    R, C = rows.shape
    sizes = _sizes(op, C, dropout)
    mean = x.new_empty((2, R), dtype=torch.float32) if centered else None
    rstd = x.new_empty(R, dtype=torch.float32)
    if R:
        inputs = rows, others, *(None if v is None else v.contiguous() for v in (weight, bias))
        strides = rows.stride(0), 0 if others is None else others.stride(0)
        grid = (triton.cdiv(R, sizes["BLOCK_R"]),)
        _fwd_kernel[grid](*inputs, total, y, mean, rstd, *strides, R, C, eps, *dropout, **sizes)
    return mean, rstd


def backward(
    op: str,
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    bias_type: int,
    dresidual: Tensor,
    dx: Tensor | None,
    dropout: tuple[int, float, int, int],
) -> tuple[Tensor, Tensor]:
    """Fills dresidual (the gradient of total) and dx (the same, through dropout); returns dweight and dbias."""
    rows = rows_of(total)
    R, C = rows.shape
    upstream = [None if g is None else rows_of(g) for g in (dy, dtotal)]
    sizes = _sizes(op, C, dropout)
    per_program = rows_per_program(R, sizes["BLOCK_R"])
    programs = triton.cdiv(R, per_program)
    dweight = rows.new_empty((0, 0) if weight is None else (programs, C), dtype=torch.float32)
    dbias = rows.new_empty((programs, C) if bias_type >= 0 else (0, 0), dtype=torch.float32)
    if R:
        inputs = *upstream, rows, None if weight is None else weight.contiguous(), mean, rstd
        results = dresidual, dx, None if weight is None else dweight, dbias if bias_type >= 0 else None
        strides = [0 if g is None else g.stride(0) for g in (*upstream, rows)]
        _bwd_kernel[(programs,)](*inputs, *results, *strides, R, C, per_program, *dropout, **sizes)
    return sum_rows(dweight, torch.float32 if weight is None else weight.dtype), sum_rows(
        dbias, KERNEL_DTYPES[max(bias_type, 0)]
    )


def _sizes(op: str, C: int, dropout: tuple[int, float, int, int]) -> dict[str, int]:
    """The constants of both kernels: a block holds whole rows."""
    block_r, block_c = row_block(op, C)
    warps = warps_for(block_r * block_c)
    return {"DROP": dropout[0] != 0, "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": warps}


@triton.jit(do_not_specialize=["threshold", "keep_scale", "seed", "offset"])
def _fwd_kernel(
    x,
    residual,
    weight,
    bias,
    total,
    y,
    mean,
    rstd,
    x_stride,
    residual_stride,
    R,
    C,
    eps,
    threshold,
    keep_scale,
    seed,
    offset,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dropout = (threshold, keep_scale, seed, offset)
    r, c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    inside = (r[:, None] < R) & (c[None, :] < C)
    r64 = r.to(tl.int64)[:, None]
    values = tl.load(x + r64 * x_stride + c[None, :], inside, other=0.0).to(tl.float32)
    if DROP:
        values = tl.where(
            keep_mask(0, r.to(tl.uint32) + first_of(dropout), 0, dropout, BLOCK_C), values * dropout[1], 0.0
        )
    if residual is not None:
        values += tl.load(residual + r64 * residual_stride + c[None, :], inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # normalise the rounded value, which the next layer reads
        tl.store(total + r64 * C + c[None, :], rounded, inside)
        values = rounded.to(tl.float32)
    if mean is not None:
        near = tl.sum(values, 1) / C
        d = tl.where(inside, values - near[:, None], 0.0)
        left = tl.sum(d, 1) / C
        variance = tl.sum(d * d, 1) / C - left * left
        center = near + left
        rest = left - (center - near)
        inverse = 1.0 / tl.sqrt_rn(tl.where(variance < 0, 0.0, variance) + eps)
        tl.store(mean + r, center, r < R)
        tl.store(mean + R + r, rest, r < R)
        result = (values - center[:, None]) * inverse[:, None] - (rest * inverse)[:, None]
    else:
        inverse = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / C + eps)
        result = values * inverse[:, None]
    tl.store(rstd + r, inverse, r < R)
    if weight is not None:
        result = result * load_vector(weight, c, C)[None, :] + load_vector(bias, c, C)[None, :]
    tl.store(y + r64 * C + c[None, :], result.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["threshold", "keep_scale", "seed", "offset"])
def _bwd_kernel(
    dy,
    dtotal,
    total,
    weight,
    mean,
    rstd,
    dresidual,
    dx,
    dweight,
    dbias,
    dy_stride,
    dtotal_stride,
    total_stride,
    R,
    C,
    rows_per_program,
    threshold,
    keep_scale,
    seed,
    offset,
    DROP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    dropout = (threshold, keep_scale, seed, offset)
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    w = tl.full((1, BLOCK_C), 1.0, tl.float32)
    if weight is not None:
        w = load_vector(weight, c, C)[None, :]
    weight_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    bias_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for r0 in range(program * rows_per_program, tl.minimum((program + 1) * rows_per_program, R), BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (r[:, None] < R) & (c[None, :] < C)
        r64 = r.to(tl.int64)[:, None]
        d = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if dy is not None:
            inverse = tl.load(rstd + r, r < R, other=0.0)[:, None]
            x = tl.load(total + r64 * total_stride + c[None, :], inside, other=0.0).to(tl.float32)
            upstream = tl.load(dy + r64 * dy_stride + c[None, :], inside, other=0.0).to(tl.float32)
            g = upstream * w
            if mean is not None:
                center = tl.load(mean + r, r < R, other=0.0)[:, None]
                rest = tl.load(mean + R + r, r < R, other=0.0)[:, None] * inverse
                xhat = tl.where(inside, (x - center) * inverse - rest, 0.0)
                d = inverse * (g - (tl.sum(g, 1) / C)[:, None] - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
            else:
                xhat = x * inverse
                d = inverse * (g - xhat * (tl.sum(g * xhat, 1) / C)[:, None])
            weight_sum += upstream * xhat
            bias_sum += upstream
        if dtotal is not None:
            d += tl.load(dtotal + r64 * dtotal_stride + c[None, :], inside, other=0.0).to(tl.float32)
        tl.store(dresidual + r64 * C + c[None, :], d.to(dresidual.dtype.element_ty), inside)
        if dx is not None:
            if DROP:
                d = tl.where(
                    keep_mask(0, r.to(tl.uint32) + first_of(dropout), 0, dropout, BLOCK_C), d * dropout[1], 0.0
                )
            tl.store(dx + r64 * C + c[None, :], d.to(dx.dtype.element_ty), inside)
    place = program.to(tl.int64) * C + c
    if dweight is not None:
        tl.store(dweight + place, tl.sum(weight_sum, 0), c < C)
    if dbias is not None:
        tl.store(dbias + place, tl.sum(bias_sum, 0), c < C)
