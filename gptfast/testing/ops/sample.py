"""sample: inputs, least work, cases, and torch's own function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.testing.case import Case, Inputs, Spec, over_logits, randn


def make(c: Case, dtype: torch.dtype, g: torch.Generator) -> Inputs:
    return (randn(c, dtype, g, c.dims["N"], c.dims["V"], scale=3.0),)


def peer(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, **options: Any) -> Tensor:
    """Temperature, top-k, top-p and a draw, the way it is written everywhere: a sort of the vocabulary."""
    scaled = logits.float() / temperature
    if top_k:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        values, order = scaled.sort(descending=True)
        probs = values.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p
        scaled = scaled.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
    return torch.multinomial(scaled.softmax(-1), 1)[:, 0]


SPEC = Spec(
    cases=[
        Case("sample", {"N": 3, "V": 15}),
        Case("sample", {"N": 8, "V": 50257}, {"temperature": 0.8, "top_p": 0.9}, bench=True),
        Case("sample", {"N": 8, "V": 50257}, {"top_k": 50}, bench=True),
        Case("sample", {"N": 8, "V": 50257}, bench=True),
    ],
    make=make,
    cost=over_logits(1),
    peer=("sort + multinomial", peer),
    has_backward=False,
)
