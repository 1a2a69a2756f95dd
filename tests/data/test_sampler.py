"""The order of training windows: each once an epoch, and a function of (seed, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.data import (
    WindowSampler,
    sequential_batches,
)
from gptfast.data.sampler import permute


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
def test_permute_is_a_permutation(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch)) == list(range(n))


def test_permute_is_uniform_over_epochs():
    """Each of 7 indices lands on each of 7 places equally often: chi-square with 36 degrees of freedom."""
    n, epochs = 7, 3500
    counts = np.zeros((n, n))
    for epoch in range(epochs):
        counts[np.arange(n), permute(np.arange(n), n, 11, epoch)] += 1
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 80  # p < 1e-4 beyond that


@pytest.mark.parametrize(("n_tokens", "block_size"), [(1000, 7), (101, 10), (110, 10), (11, 10), (25, 10), (4, 1)])
def test_an_epoch_visits_each_window_once(n_tokens, block_size):
    sampler = WindowSampler(np.arange(n_tokens), block_size, batch_size=1, seed=5)
    n = sampler.windows_per_epoch
    assert n == max(1, (n_tokens - block_size) // block_size)
    for epoch in range(3):
        starts = sorted(int(sampler.starts(epoch * n + i)[0]) for i in range(n))
        assert np.diff(starts).tolist() == [block_size] * (n - 1)
        assert starts[0] >= 0
        assert starts[-1] + block_size + 1 <= n_tokens


def test_windows_are_cut_elsewhere_in_each_epoch():
    sampler = WindowSampler(np.arange(1000), 50, batch_size=19, seed=1)
    assert sampler.windows_per_epoch == 19  # so a step is an epoch
    phases = Counter(int(sampler.starts(epoch).min()) for epoch in range(1000))
    assert sorted(phases) == list(range(50))
    assert max(phases.values()) < 45  # 20 on average


def test_batches_are_shifted_copies_of_the_data():
    tokens = np.random.default_rng(0).integers(0, 60000, 5000).astype("uint16")
    sampler = WindowSampler(tokens, 64, 3, seed=2)
    x, y = sampler.batch(7)
    assert x.shape == y.shape == (3, 64)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    for row, start in enumerate(sampler.starts(7)):
        assert x[row].tolist() == tokens[start : start + 64].tolist()
        assert y[row].tolist() == tokens[start + 1 : start + 65].tolist()


def test_a_batch_depends_on_seed_and_step_alone():
    a, b = (WindowSampler(np.arange(3000), 16, 4, seed=9) for _ in range(2))
    for step in (500, 3, 0, 10**12):
        assert torch.equal(a.batch(step)[0], b.batch(step)[0])
    c = WindowSampler(np.arange(3000), 16, 4, seed=10)
    assert not torch.equal(a.batch(0)[0], c.batch(0)[0])
    assert not torch.equal(a.batch(0)[0], a.batch(1)[0])


def test_the_order_is_part_of_the_format():
    """A resumed run must meet the same data under every later version of gptfast."""
    sampler = WindowSampler(np.arange(10_000), 32, 6, seed=2**63 + 1)
    assert sampler.starts(0).tolist() == [9665, 4225, 7873, 9633, 6017, 2657]
    assert sampler.starts(100).tolist() == [1763, 5635, 9219, 35, 4931, 355]


def test_a_batch_size_that_changes_keeps_the_order():
    sampler, larger = (WindowSampler(np.arange(3000), 16, size, seed=9) for size in (4, 6))
    whole = np.concatenate([sampler.batch(n)[0] for n in range(30)])
    assert np.array_equal(sampler.batch_from(8)[0], sampler.batch(2)[0])
    rows = [sampler.batch_from(0)[0], larger.batch_from(4)[0], larger.batch_from(10)[0]]
    assert np.array_equal(np.concatenate(rows), whole[:16])


def test_ranks_share_the_batches_of_one_process():
    tokens = np.arange(2000)
    whole = WindowSampler(tokens, 8, 6, seed=4)
    ranks = [WindowSampler(tokens, 8, 2, seed=4, rank=r, world_size=3) for r in range(3)]
    for step in (0, 1, 50):
        assert torch.equal(whole.batch(step)[0], torch.cat([rank.batch(step)[0] for rank in ranks]))


def test_a_batch_larger_than_the_epoch_repeats():
    sampler = WindowSampler(np.arange(40), 10, 8, seed=0)
    assert sampler.windows_per_epoch == 3
    rows = [tuple(s // 10 for s in sampler.starts(0)[i : i + 3]) for i in (0, 3)]
    assert all(len(set(row)) == 3 for row in rows)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (10, {"block_size": 10}, "the data has 10 tokens; expected at least 11 for block_size 10"),
        (10, {"block_size": 0}, "block_size is 0; expected at least 1"),
        (10, {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (10, {"seed": -1}, "seed is -1; expected 0 <= seed"),
        (10, {"rank": 2, "world_size": 2}, "rank is 2 and world_size 2"),
    ],
)
def test_what_the_sampler_refuses(n, options, message):
    with pytest.raises(ValueError, match=message):
        WindowSampler(np.arange(n), **{"block_size": 2, "batch_size": 1, **options})


def test_negative_steps():
    with pytest.raises(ValueError, match="step is -1"):
        WindowSampler(np.arange(10), 2, 1).batch(-1)


@pytest.mark.parametrize("n", [2, 9, 10, 11, 60, 61, 62])
def test_sequential_batches_predict_each_token_once(n):
    tokens = np.arange(100, 100 + n, dtype="uint16")
    predicted = Counter()
    for x, y in sequential_batches(tokens, block_size=5, batch_size=4):
        assert x.shape == y.shape
        assert x.shape[1] == 5
        known = y != -100
        assert (x[known] + 1 == y[known]).all()
        assert (x[~known] == 0).all()
        predicted.update(y[known].tolist())
    assert predicted == Counter(range(101, 100 + n))


def test_sequential_batches_need_two_tokens():
    with pytest.raises(ValueError, match="the data has 1 tokens; expected at least 2"):
        next(sequential_batches(np.arange(1), 5, 1))
