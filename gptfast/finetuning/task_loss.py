"""From the rows of a task to its loss.  R rows of token ids, T positions, C channels, B examples, N choices."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def real_positions(rows: Tensor, mask: Tensor | None, pad: int | None) -> Tensor:
    """(R, T), true where there is no padding.

    Args:
        rows: (R, T) token ids.
        mask: (R, T), 0 for padding; None: the token `pad` is padding.
        pad: its id; None: there is no padding.
    """
    if mask is not None:
        return mask != 0
    return torch.ones_like(rows, dtype=torch.bool) if pad is None else rows != pad


def last_positions(real: Tensor) -> Tensor:
    """(R,) position of each row's last true value of `real` (R, T); 0 where there is none."""
    return (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)


def logits_of_examples(task: str, logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Logits of examples from those of their rows: (B,) for similarity, the sum of both orders; (B, N) for choice, -inf for a
    row of padding alone; else as they are.

    Args:
        logits: (R, classes).
        ids: the ids that `TaskModel.forward` got.
        real: (R, T), true where there is no padding.
    """
    if task == "similarity":
        return logits.view(ids.shape[:2]).sum(1)
    if task == "choice":
        return logits.view(ids.shape[:2]).masked_fill(~real.any(1).view(ids.shape[:2]), float("-inf"))
    return logits


def task_loss(task: str, logits: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    """Mean loss of the examples, at least in float32: the squared error for similarity, else the cross-entropy; 0 where all of
    them are of classes of weight 0."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if task == "similarity":
        return nn.functional.mse_loss(wide, labels.to(wide.dtype))
    if class_weights is None:
        return nn.functional.cross_entropy(wide, labels)
    weights = class_weights.to(wide.dtype)
    of_all = weights[labels].sum()
    loss = nn.functional.cross_entropy(wide, labels, weight=weights, reduction="sum")
    return loss / torch.where(of_all == 0, 1, of_all)


def rows_of_lm_loss(
    task: str, hidden: Tensor, rows: Tensor, real: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and real positions of the rows of the LM loss: all of them, for choice those of the right choices."""
    if task != "choice":
        return hidden, rows, real
    right = torch.arange(len(labels), device=rows.device) * (len(rows) // len(labels)) + labels
    return hidden[right], rows[right], real[right]
