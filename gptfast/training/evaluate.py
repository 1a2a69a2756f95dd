"""The validation loss, computed over the same tokens each time."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch

from gptfast.data import TokenFile, WindowSampler, sequential_batches
from gptfast.data.packing import Batch, part_of
from gptfast.models import GPT
from gptfast.training.batch_loss import batch_loss, with_a_target
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import free

_LOGITS = 1 << 26  # largest number of logits of a forward pass


def evaluation_batches(
    tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int, pack_documents: bool = False
) -> Iterable[Batch]:
    """The batches of an evaluation, independent of the run's seed.

    Args:
        tokens: the validation tokens, at least two.
        block_size, batch_size: T and B.
        batches: number of batches. If the tokens have no more, or batches is 0: all tokens in order.
        pack_documents: see `gptfast.data.packing`.
    Returns:
        x, y: (B, T) int64; y is -100 after the end of a row.
    """
    if evaluated_tokens(tokens, block_size, batch_size, batches) == len(tokens) - 1:
        return sequential_batches(tokens, block_size, batch_size, pack_documents)
    sampler = WindowSampler(tokens, block_size, batch_size, seed=0, pack_documents=pack_documents)
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

    ranks: take the pieces of the batches in turns; the sums are those of one process, to the bit.
    """
    size, rank = (1, 0) if ranks is None else (ranks.shares, ranks.share)
    together = ranks is not None and bool(ranks.sharding)  # a rank without a piece runs another one
    was_training = model.training
    model.eval()
    parts: list[tuple[float, int]] = []  # (summed loss, tokens), in order
    pieces = _pieces(batches, model)
    while turn := list(itertools.islice(pieces, size)):
        found = [(0.0, 0)] * len(turn)
        if rank < len(turn) or together:
            piece = turn[min(rank, len(turn) - 1)]
            n = int((piece[1] != -100).sum())  # 0: packed documents of one token
            with autocast():
                loss = batch_loss(model, piece if n else with_a_target(piece), device)
            if rank < len(turn):
                found[rank] = float(loss) * n, n
        parts += found
    if together:
        free(model)
    model.train(was_training)
    if ranks is not None:
        flat = ranks.sum([value for part in parts for value in part], "the evaluation")
        parts = [(loss, int(n)) for loss, n in zip(flat[::2], flat[1::2], strict=True)]
    count = sum(n for _, n in parts)
    return functools.reduce(lambda total, part: total + part[0], parts, 0.0) / count, count


def _pieces(batches: Iterable[Batch], model: GPT) -> Iterator[Batch]:
    """The rows of all batches, as many at a time as have logits that fit."""
    for batch in batches:
        count, T = batch[0].shape
        rows = max(1, _LOGITS // (T * model.config.vocab_size))
        yield from (part_of(batch, start, start + rows) for start in range(0, count, rows))


def evaluated_tokens(tokens: TokenFile | np.ndarray, block_size: int, batch_size: int, batches: int) -> int:
    """The number of tokens in `evaluation_batches`."""
    everything, wanted = len(tokens) - 1, batches * batch_size * block_size
    return everything if batches == 0 else min(wanted, everything)
