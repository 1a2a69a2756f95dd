"""Losses in eager PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops.reference._numbers import upcast


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    logprobs = upcast(logits).log_softmax(-1)  # N V
    valid = targets != ignore_index
    picked = logprobs.gather(-1, targets.clamp(0, logprobs.shape[-1] - 1)[..., None])[..., 0]
    loss = -picked * (1 - label_smoothing)
    if label_smoothing:
        loss = loss - label_smoothing * logprobs.mean(-1)
    loss = torch.where(valid, loss, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    return cross_entropy(
        F.linear(hidden, weight),
        targets,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
