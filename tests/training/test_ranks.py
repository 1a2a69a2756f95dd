"""Ranks with different numbers of targets: loss and gradient of a step are those of one process."""

from __future__ import annotations

import copy
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from gptfast import _folders
from gptfast._locks import FileLock
from gptfast.models import GPT
from gptfast.training import accumulate_gradients
from gptfast.training.checkpoint import saved_step
from gptfast.training.messages import AnsweringStore, StoreLostError
from gptfast.training.pulse import Pulse
from gptfast.training.ranks import RankLostError, Ranks
from tests.support.training import QUICK, SHAPE, make_trainer


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


class Gone:
    """A store whose process has left."""

    def __getattr__(self, name):
        def call(*args):
            raise dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed.")

        return call


def test_a_store_that_is_gone_is_a_lost_rank():
    ranks = Ranks(1, 3, Gone(), Gone(), torch.device("cpu"), 5.0)
    for act in (lambda: ranks.main_first(lambda: None, "the start"), lambda: ranks.ask("key", "the start")):
        with pytest.raises(RankLostError, match=r"rank 1 of 3: the store is gone with .* during the start"):
            act()
    assert ranks.claims()
    told = AnsweringStore(Gone(), "rank 0", 5.0)
    with pytest.raises(RankLostError, match=r"rank 1 of 3: rank 0, which kept the store, left during the start"):
        Ranks(1, 3, told, told, torch.device("cpu"), 5.0).ask("key", "the start")


def test_who_keeps_the_store_waits_until_the_others_have_seen_the_failure():
    store = dist.HashStore()
    first, *others = (Ranks(rank, 3, store, store, torch.device("cpu"), 5.0) for rank in range(3))
    assert first.claims()
    seen = []

    def late(ranks):
        time.sleep(0.2 * ranks.rank)
        seen.append(ranks.claims())

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(late, ranks) for ranks in others]
        start = time.monotonic()
        first.await_seen(20)
        assert seen == [False, False] and time.monotonic() - start < 15
        [future.result() for future in done]
    start = time.monotonic()
    Ranks(0, 4, store, store, torch.device("cpu"), 5.0).await_seen(0.1)  # the fourth never looks
    assert time.monotonic() - start < 5


class Stopped(dist.HashStore):
    """A store whose process is stopped once `stops` is set: torch waits for it for ever."""

    stops = False

    def check(self, keys):
        while self.stops:
            time.sleep(0.01)
        return super().check(keys)


def test_a_store_that_does_not_answer_is_a_lost_rank():
    store = Stopped()
    told = AnsweringStore(store, "rank 0", 0.2)
    told.set("key", "text")
    assert told.check(["key"]) and told.get("key") == b"text"
    ranks = Ranks(1, 2, told, told, torch.device("cpu"), 5.0)
    store.stops = True
    for act in (lambda: ranks.main_first(lambda: None, "the start"), lambda: ranks.ask("key", "the start")):
        with pytest.raises(
            RankLostError, match="rank 1 of 2: rank 0, which keeps the store, did not answer during the start"
        ):
            act()
    store.stops = False
    with pytest.raises(StoreLostError):  # nobody waits for it again
        told.get("key")


def test_a_rank_without_a_sign_of_life_is_lost_and_one_that_works_long_is_not():
    store = dist.HashStore()
    first, second = (Ranks(rank, 2, store, store, torch.device("cpu"), 60.0) for rank in range(2))
    for ranks in (first, second):
        ranks.pulse = Pulse(store, ranks.rank, 2, 60.0)
        ranks.pulse.patience = 1.2
        ranks.pulse.begin()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.main_first, lambda: None, "the checkpoint")
        first.main_first(lambda: time.sleep(2.5), "the checkpoint")
        waiting.result()
        first.end_pulse()
        with pytest.raises(
            RankLostError, match=r"rank 1 of 2: rank 0 gave no sign of life for 1\.2 s during the checkpoint"
        ):
            pool.submit(second.main_first, lambda: None, "the checkpoint").result(30)
    second.end_pulse()


def test_a_rank_does_not_wait_for_the_save_of_one_that_was_stopped(tmp_path, monkeypatch):
    trainer, last = make_trainer(tmp_path, QUICK.replace(max_steps=3)), tmp_path / "last"
    trainer.train()
    trainer.state.step = 4
    monkeypatch.setattr(_folders, "_WAIT", 0.1)
    lock = FileLock(last / _folders.LOCK)  # as the stopped process holds it
    assert lock.acquire() is None
    trainer.save_alone()
    lock.release()
    assert saved_step(last) == 3
    trainer.save_alone()
    assert saved_step(last) == 4
