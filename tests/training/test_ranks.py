"""Ranks with different numbers of targets: loss and gradient of a step are those of one process."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from gptfast.models import GPT
from gptfast.training import accumulate_gradients
from gptfast.training.ranks import Ranks
from tests.support.training import SHAPE


class Threads(Ranks):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, table: list, barrier: threading.Barrier) -> None:
        super().__init__(rank, size, None, None, torch.device("cpu"), 10.0)
        self._table, self._barrier = table, barrier

    def exchange(self, values, what):
        self._table[self.rank] = list(values)
        self._barrier.wait(10)
        found = list(self._table)
        self._barrier.wait(10)
        return found


def test_a_loss_is_divided_by_the_targets_of_all_ranks_and_passes():
    torch.manual_seed(0)
    passes = []
    for _ in range(3):
        x, y = torch.randint(0, SHAPE.vocab_size, (2, 4, 16))
        passes.append((x, y.masked_fill(torch.rand(4, 16) < 0.5, -100)))
    passes[0][1][2:] = -100  # rank 1 has no target in the first pass, and nobody has one in the second
    passes[1][1][:] = -100
    model = GPT(SHAPE).train()
    models = [copy.deepcopy(model) for _ in range(3)]
    for m in models:
        m.dropout_seed, m.dropout_step = 5, 0
    expected = accumulate_gradients(models[2], passes)
    table, barrier = [None, None], threading.Barrier(2)

    def step(rank: int) -> float:
        models[rank].dropout_row = 2 * rank
        own = [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in passes]
        return accumulate_gradients(models[rank], own, ranks=Threads(rank, 2, table, barrier))

    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(step, range(2)))
    assert losses[0] == losses[1]
    assert abs(losses[0] - expected) < 1e-6
    assert models[0].dropout_step == models[1].dropout_step == models[2].dropout_step
    for a, b, whole in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a.grad + b.grad, whole.grad, rtol=0, atol=1e-6)
