"""moe: inputs, least work, cases."""

from __future__ import annotations

from typing import Any

import torch

from gptfast.testing.case import Case, Inputs, Spec, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    """Experts drawn for each token, weights that sum to 1."""
    N, C, F, E, k = (c.dims[d] for d in "NCFEk")
    experts = torch.rand(N, E, generator=g).argsort(1)[:, :k]
    weights = torch.rand(N, k, generator=g).softmax(1).to(dtype)
    gate_up = (torch.randn(E, 2 * F, C, generator=g) * C**-0.5).to(dtype)
    down = (torch.randn(E, C, F, generator=g) * F**-0.5).to(dtype)
    biases = [torch.randn(E, n, generator=g).to(dtype) for n in (2 * F, C)] if c.dims.get("bias", 1) else []
    return randn(c, dtype, g, N, C), experts, weights, gate_up, down, *biases


def case(N: int, C: int, F: int, E: int, k: int, layout: str = "contiguous", **options: Any) -> Case:
    dims = {"N": N, "C": C, "F": F, "E": E, "k": k, **{d: options.pop(d) for d in ("bias",) if d in options}}
    return Case("moe", dims, options, layout)


SPEC = Spec(
    cases=[
        case(1, 1, 1, 1, 1),
        case(9, 12, 7, 4, 2),
        case(97, 33, 20, 5, 3, "strided"),
        case(130, 24, 16, 3, 1, bias=0),
        case(60, 24, 16, 32, 4, alpha=1.702, limit=1.0, layout="interleaved"),
        case(0, 8, 4, 2, 1),
    ],
    make=make,
)
