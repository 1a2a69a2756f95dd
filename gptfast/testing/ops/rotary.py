"""rotary: inputs, least work, cases, and what it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.testing.case import Case, Inputs, Spec


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    if c.layout == "strided":  # q of a projection of q, k and v, as a model makes it
        x = torch.randn(B, T, 3, H, D, generator=g).to(dtype)[:, :, 0].transpose(1, 2)
    else:
        x = torch.randn(B, H, T, D, generator=g).to(dtype)
    return x, *ops.rotary_tables(c.dims.get("n", T), c.dims.get("R", D))


def cost(c: Case, size: int) -> tuple[float, float]:
    B, H, T, D = (c.dims[k] for k in "BHTD")
    return 0.0, 2.0 * B * H * T * D * size


def case(B: int, H: int, T: int, D: int, memory: str = "contiguous", bench: bool = False, **more: Any) -> Case:
    """R: channels that are rotated, n: rows of the tables; all else are options."""
    dims = {"B": B, "H": H, "T": T, "D": D, **{k: more.pop(k) for k in ("R", "n") if k in more}}
    return Case("rotary", dims, more, memory, bench)


def peer(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it."""
    cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


SPEC = Spec(
    cases=[
        case(1, 1, 1, 2),
        case(2, 3, 5, 64, "strided"),
        case(1, 2, 7, 30, "strided", layout="interleaved"),
        case(2, 2, 9, 80, R=20),
        case(1, 2, 6, 67, "strided", R=66, layout="interleaved"),
        case(1, 3, 4, 31, R=14),
        case(1, 6, 3, 96, "strided", R=24),
        case(2, 5, 3, 96, "strided", R=64, layout="interleaved"),
        case(2, 1, 3, 16, n=50, positions=torch.tensor([[49, 0, 7], [3, 3, 2]])),
        case(
            2, 2, 4, 34, "strided", n=9, positions=torch.tensor([5, 8, 0, 1], dtype=torch.int32), layout="interleaved"
        ),
        case(1, 2, 130, 128, "strided"),
        case(0, 2, 3, 8),
        case(1, 2, 0, 8),
        case(4, 12, 1024, 64, "strided", bench=True),
        case(1, 32, 2048, 128, "strided", bench=True),
    ],
    make=make,
    cost=cost,
    peer=("as in transformers", peer),
    non_differentiable=(1, 2),
)
