"""relu_squared: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, pointwise, randn, rows


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return (randn(c, dtype, g, c.dims["N"], c.dims["C"], scale=3.0),)


def peer(x: Tensor) -> Tensor:
    return F.relu(x).square()


SPEC = Spec(
    cases=[
        rows("relu_squared", 1, 1),
        rows("relu_squared", 3, 15),
        rows("relu_squared", 7, 33, "strided"),
        rows("relu_squared", 130, 70),
        rows("relu_squared", 1, 9001),
        rows("relu_squared", 5, 2049, "strided"),
        rows("relu_squared", 0, 8),
        rows("relu_squared", 4096, 3072, bench=True),
    ],
    make=make,
    cost=pointwise(2),
    peer=("F.relu, squared", peer),
)
