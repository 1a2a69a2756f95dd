"""The validation loss, computed over the same tokens each time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from gptfast.data import TokenFile, WindowSampler, sequential_batches
from gptfast.models import GPT
from gptfast.training.ranks import Ranks

_LOGITS = 1 << 26  # largest number of logits of a forward pass
Batch = tuple[Tensor, Tensor]


def evaluation_batches(
    tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int
) -> Iterable[Batch]:
    """The batches of an evaluation, independent of the run's seed.

    Args:
        tokens: the validation tokens, at least two.
        block_size, batch_size: T and B.
        batches: number of batches. If the tokens have no more, or batches is 0: all tokens in order.
    Returns:
        Pairs x, y: (B, T) int64; y is -100 after the end of a row.
    """
    if evaluated_tokens(tokens, block_size, batch_size, batches) == len(tokens) - 1:
        return sequential_batches(tokens, block_size, batch_size)
    sampler = WindowSampler(tokens, block_size, batch_size, seed=0)
    return (sampler.batch(n) for n in range(batches))


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Batch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    ranks: Ranks | None = None,
) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, without dropout, and the number of tokens. The model keeps its mode.

    ranks: take the batches in turns; the sums are those of one process, to the bit.
    """
    was_training = model.training
    model.eval()
    parts: list[tuple[float, int]] = []  # (summed loss, tokens), in order
    for number, (x, y) in enumerate(batches):
        if ranks is not None and number % ranks.size != ranks.rank:
            parts += [(0.0, 0)] * _pieces(x, model)
            continue
        rows = _rows_at_once(x, model)
        for part, wanted in zip(x.split(rows), y.split(rows), strict=True):
            n = int((wanted != -100).sum())  # at least 1: no row is empty
            with autocast():
                _, loss = model(part.to(device), wanted.to(device))
            parts.append((float(loss) * n, n))
    model.train(was_training)
    if ranks is not None:
        flat = ranks.sum([value for part in parts for value in part], "the evaluation")
        parts = [(loss, int(n)) for loss, n in zip(flat[::2], flat[1::2], strict=True)]
    count = sum(n for _, n in parts)
    return functools.reduce(lambda total, part: total + part[0], parts, 0.0) / count, count


def _rows_at_once(x: Tensor, model: GPT) -> int:
    return max(1, _LOGITS // (x.shape[1] * model.config.vocab_size))


def _pieces(x: Tensor, model: GPT) -> int:
    return -(-len(x) // _rows_at_once(x, model))


def evaluated_tokens(tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int) -> int:
    """The number of tokens in `evaluation_batches`."""
    everything, wanted = len(tokens) - 1, batches * batch_size * block_size
    return everything if batches == 0 else min(wanted, everything)
