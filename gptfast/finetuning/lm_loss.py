"""The language-modelling loss beside that of a task.  R rows, T positions, C channels."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import ops
from gptfast.finetuning.instructions import IGNORED
from gptfast.models import BERT, GPT


def mean_of_rows(gpt: GPT | BERT, hidden: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Mean over rows of the mean cross-entropy of each real token given those before it; never holds all logits.

    Args:
        gpt: whose head is used.
        hidden: (R, T, C) of ids.  ids: (R, T).  real: (R, T), False at padding. Rows of one token do not count; 0 where
            there are no others.
    """
    counts = real[:, 1:] & real[:, :-1]
    x, targets = hidden[:, :-1], ids[:, 1:].long()
    if torch.compiler.is_compiling():  # a graph has no tensors whose size the data decides: padding is computed too
        losses = _losses(gpt, x, targets.masked_fill(~counts, IGNORED))
        return (losses * _weights(counts, losses.dtype)).sum()
    losses = _losses(gpt, x[counts], targets[counts])
    return (losses * _weights(counts, losses.dtype).expand_as(counts)[counts]).sum()


def _losses(gpt: GPT | BERT, x: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each of `targets` from the hidden states before them; 0 for IGNORED."""
    if gpt.has_plain_head():
        return ops.linear_cross_entropy(x, gpt.lm_head.weight, targets, reduction="none")
    return ops.cross_entropy(gpt.logits_of(x), targets, reduction="none")


def _weights(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1): of each token of a row in the mean of the rows' means."""
    of_row = counts.sum(1, keepdim=True).to(dtype)
    return 1 / of_row.clamp_min(1) / (of_row > 0).sum().clamp_min(1)
