"""The loss of a batch, of windows or of packed documents."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.data.packing import Batch, part_of
from gptfast.models import GPT


def batch_loss(model: GPT, batch: Batch, device: torch.device | str) -> Tensor:
    """Mean cross-entropy in nats over the targets of a batch that are not -100; there must be one.

    The rows of a packed batch are one long row to the model. With dropout of attention weights, whose mask is a function of the
    places in a row, each is a row of its own, as without packing: so the masks do not depend on the number of ranks.

    Args:
        model: a GPT.
        batch: x, y, (B, T) each, and of a packed one the ends of its texts (`gptfast.data.packing`).
        device: the device of the model.
    """
    x, y, *packed = batch
    if not packed:
        if torch.device(device).type == "cuda":  # from pinned memory a copy does not wait for the steps before
            x, y = x.pin_memory(), y.pin_memory()
        return model(x.to(device, non_blocking=True), y.to(device, non_blocking=True))[1]
    if not (model.training and model.config.attn_pdrop > 0):
        return _long_row(model, batch, device, model.dropout_row // len(x))
    step, first, count = model.dropout_step, model.dropout_row, int((y != -100).sum())
    losses = []
    for n in range(len(x)):  # all of them: where parameters are divided, every rank takes part in every pass
        row = part_of(batch, n, n + 1)
        share = int((row[1] != -100).sum()) / count
        model.dropout_step = step
        losses.append(_long_row(model, row if share else with_a_target(row), device, first + n) * share)
    return torch.stack(losses).sum()


def with_a_target(batch: Batch) -> Batch:
    """A batch without targets, with one, so that its loss is finite; it is to count 0 times."""
    x, y, *ends = batch
    y = y.clone()
    y[0, 0] = 0
    return x, y, *ends


def _long_row(model: GPT, batch: Batch, device: torch.device | str, number: int) -> Tensor:
    """number: which row of the whole batch this is, where all are as long."""
    x, y, ends = batch
    before = model.dropout_row
    model.dropout_row = number
    try:
        return model(x.reshape(1, -1).to(device), y.reshape(1, -1).to(device), cu_seqlens=ends.to(device))[1]
    finally:
        model.dropout_row = before
