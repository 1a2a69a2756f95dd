"""The language-modelling loss beside that of a task.  R rows, T positions, C channels."""

from __future__ import annotations

from torch import Tensor

from gptfast import ops
from gptfast.models import BERT, GPT


def mean_of_rows(gpt: GPT | BERT, hidden: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Mean over rows of the mean cross-entropy of each real token given those before it; never holds all logits.

    Args:
        gpt: whose head is used.
        hidden: (R, T, C) of ids.  ids: (R, T).  real: (R, T), False at padding. Rows of one token do not count; 0 where
            there are no others.
    """
    counts = real[:, 1:] & real[:, :-1]
    x, targets = hidden[:, :-1][counts], ids[:, 1:][counts].long()
    if gpt.has_plain_head():
        losses = ops.linear_cross_entropy(x, gpt.lm_head.weight, targets, reduction="none")
    else:
        losses = ops.cross_entropy(gpt.logits_of(x), targets, reduction="none")
    of_row = counts.sum(1, keepdim=True).to(losses.dtype)  # R 1
    weights = 1 / of_row.clamp_min(1) / (of_row > 0).sum().clamp_min(1)
    return (losses * weights.expand_as(counts)[counts]).sum()
