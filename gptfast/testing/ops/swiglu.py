"""swiglu: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, pointwise, randn, rows

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    N, C = c.dims["N"], c.dims["C"]
    if c.dims.get("packed"):
        return randn(c, dtype, g, N, 2 * C, scale=4.0), None
    return randn(c, dtype, g, N, C, scale=4.0), randn(c, dtype, g, N, C, scale=4.0)


def packed(N: int, C: int, memory: str = "contiguous", bench: bool = False, **options: Any) -> Case:
    """gate and up as columns of one tensor."""
    return Case("swiglu", {"N": N, "C": C, "packed": 1}, options, memory, bench)


def peer(gate: Tensor, up: Tensor | None, alpha: float | None = None, limit: float | None = None, **o: Any) -> Tensor:
    if up is None:
        gate, up = gate[..., ::2], gate[..., 1::2]
    if alpha is None or limit is None:
        return F.silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(alpha * gate))


SPEC = Spec(
    cases=[
        rows("swiglu", 1, 1),
        rows("swiglu", 3, 15, **GPT_OSS),
        rows("swiglu", 7, 33, "strided"),
        rows("swiglu", 130, 70, limit=3.0),
        rows("swiglu", 1, 9001, alpha=0.5),
        rows("swiglu", 5, 2049, "strided", **GPT_OSS),
        packed(1, 1),
        packed(7, 33, "strided", **GPT_OSS),
        packed(66, 40, layout="halves"),
        packed(3, 1, layout="interleaved", **GPT_OSS),
        packed(7, 33, "strided", layout="interleaved", **GPT_OSS),
        packed(5, 2049, layout="interleaved"),
        packed(0, 8, layout="interleaved"),
        rows("swiglu", 0, 8),
        rows("swiglu", 4096, 3072, bench=True),
        packed(4096, 2880, bench=True, layout="interleaved", **GPT_OSS),
    ],
    make=make,
    cost=pointwise(3),
    peer=("F.silu times up", peer),
)
