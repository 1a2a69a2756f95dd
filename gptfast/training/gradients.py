"""Gradients of one step, from one or more batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gptfast.data.packing import Batch
from gptfast.models import GPT
from gptfast.training.batch_loss import batch_loss, with_a_target
from gptfast.training.ranks import Ranks
from gptfast.training.routing import Routing
from gptfast.training.sharding import plan_pass


def accumulate_gradients(
    model: GPT,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    device: torch.device | str = "cpu",
    ranks: Ranks | None = None,
    routing: Routing | None = None,
) -> float | Tensor:
    """Add the gradient of the mean loss over all targets of all batches to the parameters' gradients.

    loss = sum_i loss_i * count_i / sum_i count_i, where count_i is the number of targets of batch i that are not -100. The
    distribution of rows over batches changes it by rounding only.

    Args:
        model: a GPT in training mode.
        batches: x and y, (B, T) int64 each, and the ends of texts where they are packed (`gptfast.data.packing`).
        autocast: returns the context manager of a forward pass.
        device: the device of the model.
        ranks: the processes that have a part of every batch each; the counts are then those of all. The gradients are still
            to be summed over the ranks, or summed already where the ranks have a part of the parameters each.
        routing: of a model with experts: its auxiliary loss is minimised too. None: it is not.
    Returns:
        The loss; of one process on a GPU a scalar there, which is not waited for.
    Raises:
        ValueError: every target is -100.
    """
    counts = [int((batch[1] != -100).sum()) for batch in batches]
    everywhere = counts if ranks is None else [int(n) for n in ranks.sum(counts, "the counts of targets")]
    if not sum(everywhere):
        raise ValueError("accumulate_gradients: every target is -100; expected at least one other")
    total, on_gpu = torch.zeros((), dtype=torch.float64, device=device), torch.device(device).type == "cuda"
    start, waited = time.perf_counter(), 0.0 if ranks is None else ranks.waited
    last = max(n for n, others in enumerate(everywhere) if others)
    for n, (batch, count, others) in enumerate(zip(batches, counts, everywhere, strict=True)):
        targets = batch[1]
        if ranks is not None and ranks.sharding:
            plan_pass(model, ranks, n == last)
            batch = batch if count or not others else with_a_target(batch)  # all ranks take part in a pass
        elif others and not count:
            model.skip_forward()
            if routing is not None:
                routing.skip()
        if count or (others and ranks is not None and ranks.sharding):
            share = count / sum(everywhere)
            with autocast(), nullcontext() if routing is None else routing.watched():
                loss = batch_loss(model, batch, device)
            whole = loss if routing is None else loss + routing.loss(targets, share)
            (whole * share).backward()
            total += loss.detach() * share
    if ranks is None:
        return total if on_gpu else float(total)
    seconds = time.perf_counter() - start - (ranks.waited - waited)
    found = ranks.exchange([float(total), seconds], "the losses")
    ranks.seconds = [row[1] for row in found]
    return sum(row[0] for row in found[:: ranks.tensor])
