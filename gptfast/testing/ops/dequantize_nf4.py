"""dequantize_nf4: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

import torch

from gptfast import ops
from gptfast.testing.case import Case, Inputs, Spec


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    weight = torch.randn(c.options["shape"], generator=g)
    return ops.quantize_nf4(weight, block_size=c.options["block_size"], double=bool(c.dims.get("double")))


def case(*shape: int, block_size: int = 64, dtype: torch.dtype = torch.float32, **dims: int) -> Case:
    return Case("dequantize_nf4", dims, {"shape": shape, "block_size": block_size, "dtype": dtype})


SPEC = Spec(
    cases=[
        case(1),
        case(3, 5, block_size=16, dtype=torch.float16),
        case(40, 100, double=1),
        case(7, 33, 23, block_size=16, dtype=torch.float16, double=1),  # two blocks of scales
        case(300, 64, block_size=4096),
        case(0, 8),
    ],
    make=make,
    non_differentiable=(1, 2, 3),
)
