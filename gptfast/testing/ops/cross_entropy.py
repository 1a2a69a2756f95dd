"""cross_entropy: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, over_logits, randn, targets


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return randn(c, dtype, g, c.dims["N"], c.dims["V"], scale=3.0), targets(c, g)


def case(N: int, V: int, layout: str = "contiguous", bench: bool = False, **options: Any) -> Case:
    return Case("cross_entropy", {"N": N, "V": V}, options, layout, bench)


def peer(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, targets, **options)


SPEC = Spec(
    cases=[
        case(1, 1),
        case(7, 15, reduction="none"),
        case(9, 33, "strided", reduction="sum", label_smoothing=0.1),
        case(6, 2049, label_smoothing=1.0, ignore_index=-1),
        case(5, 5003, "strided", ignore_index=3, label_smoothing=0.3, reduction="none"),
        case(2048, 50257, bench=True),
    ],
    make=make,
    cost=over_logits(1),
    peer=("F.cross_entropy", peer),
)
