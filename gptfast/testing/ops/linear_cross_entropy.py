"""linear_cross_entropy: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, randn, targets


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    N, C, V = (c.dims[k] for k in "NCV")
    return randn(c, dtype, g, N, C), (torch.randn(V, C, generator=g) * C**-0.5).to(dtype), targets(c, g)


def cost(c: Case, size: int) -> tuple[float, float]:
    N, C, V = (c.dims[k] for k in "NCV")
    return 2.0 * N * C * V, (N * C + V * C) * size


def case(N: int, C: int, V: int, bench: bool = False, **options: Any) -> Case:
    return Case("linear_cross_entropy", {"N": N, "C": C, "V": V}, options, bench=bench, slow_reference=bench)


def peer(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets, **options)


SPEC = Spec(
    cases=[
        case(7, 8, 15, reduction="none"),
        case(9, 16, 33, reduction="sum", label_smoothing=0.1),
        case(11, 24, 2049, ignore_index=3),
        case(2048, 768, 50257, bench=True),
    ],
    make=make,
    cost=cost,
    peer=("F.linear + F.cross_entropy", peer),
    floors={
        torch.bfloat16: (0.0, 0.1),  # 0.037: logits and their gradient are stored, as eager does
        torch.float16: (0.0, 0.1),  # 0.003
    },
)
