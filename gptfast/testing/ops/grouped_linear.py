"""grouped_linear: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Groups of random sizes; with few rows some have none."""
    M, G, K, N = (c.dims[k] for k in "MGKN")
    ends = torch.randint(M + 1, (G - 1,), generator=g).sort().values
    offsets = torch.cat([torch.tensor([0]), ends, torch.tensor([M])])
    weight = (torch.randn(G, N, K, generator=g) * K**-0.5).to(dtype)
    bias = torch.randn(G, N, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return randn(c, dtype, g, M, K), offsets, weight, bias


def cost(c: Case, size: int) -> tuple[float, float]:
    M, G, K, N = (c.dims[k] for k in "MGKN")
    return 2.0 * M * K * N, (M * K + M * N + G * K * N) * size


def case(M: int, G: int, K: int, N: int, layout: str = "contiguous", bench: bool = False, **extra: Any) -> Case:
    return Case("grouped_linear", {"M": M, "G": G, "K": K, "N": N, **extra}, {}, layout, bench)


def peer(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.grouped_mm, a group's bias to each of its rows."""
    y = F.grouped_mm(x, weight.transpose(1, 2), offs=offsets[1:].int())
    return y if bias is None else y + bias.repeat_interleave(offsets.diff(), 0)


SPEC = Spec(
    cases=[
        case(1, 1, 1, 1),
        case(7, 5, 15, 9),
        case(97, 3, 33, 65, "strided"),
        case(130, 4, 70, 20, bias=0),
        case(0, 2, 8, 4),
        case(4096, 32, 768, 768, bench=True),
    ],
    make=make,
    cost=cost,
    peer=("F.grouped_mm", peer),
)
