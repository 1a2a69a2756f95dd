"""dropout: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, pointwise, randn, rows


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return (randn(c, dtype, g, c.dims["N"], c.dims["C"]),)


def peer(x: Tensor, p: float = 0.0, **options: Any) -> Tensor:
    return F.dropout(x, p)


SPEC = Spec(
    cases=[
        rows("dropout", 1, 1, p=0.5),
        rows("dropout", 3, 15, p=0.0),
        rows("dropout", 7, 33, "strided", p=0.3, seed=2**63, offset=2**32 - 1),
        rows("dropout", 5, 1029, p=0.9),
        rows("dropout", 4, 70, p=1.0),
        rows("dropout", 0, 8, p=0.1),
        rows("dropout", 4096, 768, p=0.1, bench=True),
    ],
    make=make,
    cost=pointwise(2),
    peer=("F.dropout", peer),
)
