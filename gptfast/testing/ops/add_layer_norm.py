"""add_layer_norm: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, norm_inputs, pointwise, randn, rows


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    x, weight, bias = norm_inputs(c, dtype, g)
    residual = randn(c, torch.float32 if c.dims.get("fp32_residual") else dtype, g, c.dims["N"], c.dims["C"])
    return x, residual, weight, bias


def peer(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, dropout_p: float = 0.0, **o: Any
) -> tuple[Tensor, Tensor]:
    total = F.dropout(x, dropout_p) + residual
    return F.layer_norm(total, (x.shape[-1],), weight, bias), total


SPEC = Spec(
    cases=[
        rows("add_layer_norm", 1, 1),
        rows("add_layer_norm", 3, 15, dropout_p=0.5, seed=1),
        rows("add_layer_norm", 7, 33, "strided"),
        rows("add_layer_norm", 130, 70, bias=0, dropout_p=0.1, seed=2**64 - 1, offset=3),
        rows("add_layer_norm", 5, 1023, fp32_weights=1, fp32_residual=1, dropout_p=0.2),
        rows("add_layer_norm", 9, 129, fp32_residual=1, dropout_p=1.0),
        rows("add_layer_norm", 66, 41, fp32_residual=1, dropout_p=0.1, out_dtype=torch.bfloat16),
        rows("add_layer_norm", 9, 136, fp32_residual=1, fp32_weights=1, out_dtype=torch.float16),
        rows("add_layer_norm", 6, 24, out_dtype=torch.float32),
        rows("add_layer_norm", 70, 160, dropout_p=0.3, seed=5),
        rows("add_layer_norm", 5, 96, "strided", out_dtype=torch.bfloat16),
        rows("add_layer_norm", 0, 8),
        rows("add_layer_norm", 4096, 768, bench=True),
        rows("add_layer_norm", 4096, 768, dropout_p=0.1, bench=True),
    ],
    make=make,
    cost=pointwise(4),
    peer=("F.layer_norm of the sum", peer),
)
