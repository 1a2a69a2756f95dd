"""The validation loss, always over the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from gptfast.data import TokenFile, WindowSampler, sequential_batches
from gptfast.models import GPT

_LOGITS = 1 << 26  # at most so many at a time
Batch = tuple[Tensor, Tensor]


def evaluation_batches(
    tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int
) -> Iterable[Batch]:
    """The same windows each time, whatever the run's seed.

    Args:
        tokens: of the validation documents, at least two.
        block_size, batch_size: T and B.
        batches: how many batches; where the tokens have no more than that, or batches is 0, all of them in order.
    Returns:
        x, y: (B, T) int64 pairs, y being -100 where a row ends early.
    """
    if evaluated_tokens(tokens, block_size, batch_size, batches) == len(tokens) - 1:
        return sequential_batches(tokens, block_size, batch_size)
    sampler = WindowSampler(tokens, block_size, batch_size, seed=0)
    return (sampler.batch(n) for n in range(batches))


@torch.no_grad()
def evaluate(
    model: GPT, batches: Iterable[Batch], autocast: Callable[[], AbstractContextManager], device: torch.device
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, without dropout, and over how many tokens; the model's mode is kept."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for x, y in batches:
        rows = max(1, _LOGITS // (x.shape[1] * model.config.vocab_size))
        for part, wanted in zip(x.split(rows), y.split(rows), strict=True):
            n = int((wanted != -100).sum())  # at least 1: a row ends early, but is not empty
            with autocast():
                _, loss = model(part.to(device), wanted.to(device))
            total += float(loss) * n
            count += n
    model.train(was_training)
    return total / count, count


def evaluated_tokens(tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int) -> int:
    """How many tokens the loss over `evaluation_batches` is the mean of."""
    everything, wanted = len(tokens) - 1, batches * batch_size * block_size
    return everything if batches == 0 else min(wanted, everything)
