"""linear: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    N, C, M = (c.dims[k] for k in "NCM")
    bias = torch.randn(M, generator=g).to(dtype) if c.dims.get("bias", 1) else None
    return randn(c, dtype, g, N, C), (torch.randn(M, C, generator=g) * C**-0.5).to(dtype), bias


def cost(c: Case, size: int) -> tuple[float, float]:
    N, C, M = (c.dims[k] for k in "NCM")
    return 2.0 * N * C * M, (N * C + N * M + C * M) * size


def case(N: int, C: int, M: int, layout: str = "contiguous", bench: bool = False, **extra: Any) -> Case:
    dims = {"N": N, "C": C, "M": M, **{k: extra.pop(k) for k in ("bias",) if k in extra}}
    return Case("linear", dims, extra, layout, bench)


def peer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


SPEC = Spec(
    cases=[
        case(1, 1, 1),
        case(16, 15, 7),
        case(97, 33, 65, "strided"),
        case(200, 70, 1, bias=0),
        case(31, 513, 40, activation="gelu_tanh"),
        case(130, 8, 770, "strided", activation="gelu"),
        case(33, 70, 65, "strided", activation="relu"),
        case(31, 40, 130, activation="relu_squared"),
        case(31, 40, 130, activation="silu"),
        case(31, 40, 130, activation="quick_gelu"),
        case(31, 40, 130, activation="tanh"),
        case(0, 8, 4),
        case(4096, 768, 3072, bench=True),
        case(4096, 3072, 768, bench=True),
    ],
    make=make,
    cost=cost,
    peer=("F.linear", peer),
)
