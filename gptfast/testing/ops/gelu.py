"""gelu: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, pointwise, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    N, C = c.dims["N"], c.dims["C"]
    bias = torch.randn(C, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return randn(c, dtype, g, N, C, scale=3.0), bias


def peer(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


SPEC = Spec(
    cases=[
        Case("gelu", {"N": 1, "C": 1}, {"approximate": "tanh"}),
        Case("gelu", {"N": 3, "C": 15}),
        Case("gelu", {"N": 7, "C": 33}, {"approximate": "none"}, "strided"),
        Case("gelu", {"N": 130, "C": 70}, {"approximate": "tanh"}),
        Case("gelu", {"N": 1, "C": 9001, "bias": 0}, {"approximate": "none"}),
        Case("gelu", {"N": 5, "C": 2049}, {"approximate": "tanh"}, "strided"),
        Case("gelu", {"N": 0, "C": 8}),
        Case("gelu", {"N": 4096, "C": 3072}, {"approximate": "tanh"}, bench=True),
    ],
    make=make,
    cost=pointwise(2),
    peer=("F.gelu", peer),
    floors={torch.bfloat16: (0.05, 0.03)},  # 0.030, 0.016: an approximate reciprocal on AVX2
)
