"""rms_norm: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, norm_inputs, pointwise, rows


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    x, weight, _ = norm_inputs(c, dtype, g)
    return x, None if c.dims.get("no_weight") else weight


def peer(x: Tensor, weight: Tensor | None) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)


SPEC = Spec(
    cases=[
        rows("rms_norm", 1, 1),
        rows("rms_norm", 3, 15, no_weight=1),
        rows("rms_norm", 7, 33, "strided", eps=1e-3),
        rows("rms_norm", 130, 70),
        rows("rms_norm", 5, 1023, fp32_weights=1),
        rows("rms_norm", 65, 768, no_weight=1),
        rows("rms_norm", 67, 40, out_dtype=torch.bfloat16),
        rows("rms_norm", 9, 133, "strided", out_dtype=torch.float16),
        rows("rms_norm", 5, 64, out_dtype=torch.float32),
        rows("rms_norm", 133, 24),  # rows of heads, several of which share a warp on GPUs
        rows("rms_norm", 37, 128, fp32_weights=1),
        rows("rms_norm", 0, 8),
        rows("rms_norm", 4096, 768, bench=True),
    ],
    make=make,
    cost=pointwise(2),
    peer=("F.rms_norm", peer),
)
