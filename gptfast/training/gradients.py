"""Gradients of one step, from one or more batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from gptfast.models import GPT
from gptfast.training.evaluate import Batch
from gptfast.training.ranks import Ranks


def accumulate_gradients(
    model: GPT,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
) -> float:
    """Add the gradient of the mean loss over all targets of all batches to the parameters' gradients.

    loss = sum_i loss_i * count_i / sum_i count_i, where count_i is the number of targets of batch i that are not -100. The
    distribution of rows over batches changes it by rounding only.

    Args:
        model: a GPT in training mode.
        batches: pairs (x, y), each (B, T) int64.
        autocast: returns the context manager of a forward pass.
        device: the device of the model.
        ranks: the processes that have a part of every batch each; the counts are then those of all, and the gradients are
            still to be summed over the ranks.
    Returns:
        The loss.
    Raises:
        ValueError: every target is -100.
    """
    counts = [int((y != -100).sum()) for _, y in batches]
    everywhere = counts if ranks is None else [int(n) for n in ranks.sum(counts, "the counts of targets")]
    if not sum(everywhere):
        raise ValueError("accumulate_gradients: every target is -100; expected at least one other")
    total = 0.0
    for (x, y), count, others in zip(batches, counts, everywhere, strict=True):
        if count:
            with autocast():
                _, loss = model(x.to(device), y.to(device))
            share = loss * (count / sum(everywhere))
            share.backward()
            total += float(share.detach())
        elif others:
            model.skip_forward()
    return total if ranks is None else ranks.sum([total], "the losses")[0]
