"""Mixtures of experts in eager PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops.reference._numbers import upcast
from gptfast.ops.reference.rows import swiglu


def grouped_linear(x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    ends = offsets.tolist()
    parts = []
    for g, (first, last) in enumerate(pairwise(ends)):
        parts.append(F.linear(x[first:last], weight[g], None if bias is None else bias[g]))
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])


def moe(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    alpha: float | None = None,
    limit: float | None = None,
    layout: str = "halves",
) -> Tensor:
    """Every token through every expert; what it was not sent to counts 0."""
    total = torch.zeros_like(upcast(x))
    for e in range(len(gate_up)):
        hidden = F.linear(x, gate_up[e], None if gate_up_bias is None else gate_up_bias[e])
        hidden = swiglu(hidden, alpha=alpha, limit=limit, layout=layout)
        y = F.linear(hidden, down[e], None if down_bias is None else down_bias[e])
        share = (upcast(weights) * (experts == e)).sum(1, keepdim=True)
        total = total + upcast(y) * share.to(total.dtype)
    return total.to(x.dtype)
