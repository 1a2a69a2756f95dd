"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), alone or after dropout and a residual sum: LayerNorm's kernels without a mean.

    total = dropout(x) + residual                                     (add_rms_norm only)
    y = total rstd weight,   rstd = 1 / sqrt(mean(total^2) + eps)
    dtotal += rstd (g - xhat mean(g xhat)),  g = dy weight,  xhat = total rstd;   dweight = sum_rows dy xhat

Floor: as of LayerNorm, one read and one write forward (with a residual two and two), two reads and one write backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.backend import KERNEL_DTYPES
from gptfast.triton._philox import dropout_arguments
from gptfast.triton.layer_norm import NO_DROPOUT, backward, forward


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, y_type: int) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=KERNEL_DTYPES[y_type], device=x.device)
    return y, forward("rms_norm", x, None, weight, None, None, y, eps, NO_DROPOUT, False)[1]


def add_rms_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: int,
    offset: int,
    y_type: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if x.dtype == residual.dtype else torch.float32
    y, total = (torch.empty(x.shape, dtype=kind, device=x.device) for kind in (KERNEL_DTYPES[y_type], dtype))
    dropout = dropout_arguments(dropout_p, seed, offset)
    return y, total, forward("add_rms_norm", x, residual, weight, None, total, y, eps, dropout, False)[1]


def rms_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, backward("rms_norm", dy, None, x, weight, None, rstd, -1, dx, None, NO_DROPOUT)[0]


def add_rms_norm_bwd(
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    x_type: int,
    residual_type: int,
    dropout_p: float,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx is empty if it would equal dresidual: without dropout and with x_type == residual_type."""
    dropout = dropout_arguments(dropout_p, seed, offset)
    own_dx = dropout[0] != 0 or x_type != residual_type
    dresidual = torch.empty(total.shape, dtype=KERNEL_DTYPES[residual_type], device=total.device)
    dx = torch.empty(total.shape if own_dx else 0, dtype=KERNEL_DTYPES[x_type], device=total.device)
    others = weight, None, rstd, -1, dresidual, dx if own_dx else None, dropout
    return dx, dresidual, backward("add_rms_norm", dy, dtotal, total, *others)[0]
