"""Steps whose loss or gradient is not finite, or far above those before: left out, gone back from, or the end of the run."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast.models import GPT
from gptfast.nn.mlp import MLP
from gptfast.training import read_checkpoint
from gptfast.training.bad_step import replay
from gptfast.training.log import read_log
from gptfast.training.spikes import beyond, what_is_wrong
from tests.support.training import QUICK, SHAPE, make_trainer, resumed

STEPS = QUICK.replace(max_steps=24, eval_every=6, eval_batches=1)
BAD = 16  # the step whose batch is bad, counted from 1


@pytest.fixture
def seen(tmp_path, monkeypatch) -> list[bytes]:
    """The batches that are trained on; that of step 16 gives a loss of 30, or with `seen.append(b"nan")` NaN in h.1.mlp."""
    probe = make_trainer(tmp_path / "probe", STEPS)
    bad = probe.objective.batches(4 * (BAD - 1), STEPS)[0][0].numpy().tobytes()
    probe._release()
    seen, forward, mlp, now = [], GPT.forward, MLP.forward, []

    def poisoned(self, ids, targets=None, **options):
        if not self.training:
            return forward(self, ids, targets, **options)
        seen.append(ids.numpy().tobytes())
        now[:] = [b"nan" in seen] if seen[-1] == bad else []
        out, loss = forward(self, ids, targets, **options)
        return out, loss * 10 if now[:1] == [False] else loss

    def broken(self, x, **options):
        now[:] = [*now, "layer"] if now else now
        y = mlp(self, x, **options)
        return y * math.nan if now == [True, "layer", "layer"] else y

    monkeypatch.setattr(GPT, "forward", poisoned)
    monkeypatch.setattr(MLP, "forward", broken)
    seen.append(bad)
    return seen


def records(tmp_path):
    return read_log(tmp_path / "run" / "log.jsonl")


@pytest.mark.parametrize("kind", ["high", "nan"])
def test_skip_leaves_the_batch_out_and_goes_on(tmp_path, seen, kind):
    seen.extend([b"nan"] if kind == "nan" else [])
    trainer = make_trainer(tmp_path / "run", STEPS.replace(on_spike="skip"))
    before: dict[int, torch.Tensor] = {}
    update = trainer._update

    def watched():
        record = update()
        before[trainer.state.step] = trainer.model.wte.weight.detach().clone()
        return record

    trainer._update = watched
    assert trainer.train().steps == 24
    assert torch.equal(before[BAD - 1], before[BAD]) and not torch.equal(before[BAD], before[BAD + 1])
    found = {r["step"]: r for r in records(tmp_path)}
    assert list(found) == list(range(1, 25)) and [n for n in found if "wrong" in found[n]] == [BAD]
    assert found[BAD]["done"] == "left out" and ("loss" in found[BAD]) == (kind == "high")
    assert all(
        math.isfinite(value) for record in found.values() for value in record.values() if isinstance(value, float)
    )


@pytest.mark.parametrize("kind", ["high", "nan"])
def test_rewind_never_trains_on_the_batch_again(tmp_path, seen, kind):
    seen.extend([b"nan"] if kind == "nan" else [])
    start = len(seen)
    trainer = make_trainer(tmp_path / "run", STEPS.replace(on_spike="rewind"))
    assert trainer.train().steps == 24
    assert seen[start:].count(seen[0]) == 1
    found = records(tmp_path)
    assert [r["step"] for r in found if "loss" in r] == list(range(1, 25))
    assert [(r["step"], r["rewound_from"]) for r in found if "rewound_from" in r] == [(12, BAD)]
    assert trainer.state.rows == 4 * 25 and read_checkpoint(tmp_path / "run" / "last").state.left_out == [[60, 4]]


def test_a_run_that_went_back_is_the_same_wherever_it_was_interrupted(tmp_path, seen):
    config = STEPS.replace(on_spike="rewind", lr_decay_steps=24)
    make_trainer(tmp_path / "whole", config).train()
    whole = load_file(tmp_path / "whole" / "last" / "model.safetensors")
    for steps in (14, 18):
        make_trainer(tmp_path / str(steps), config.replace(max_steps=steps)).train()
        resumed(tmp_path / str(steps), config).train()
        parts = load_file(tmp_path / str(steps) / "last" / "model.safetensors")
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_spike_before_the_first_checkpoint_goes_back_to_the_start(tmp_path, seen):
    trainer = make_trainer(tmp_path / "run", STEPS.replace(on_spike="rewind", eval_every=20))
    trainer.train()
    assert [(r["step"], r["rewound_from"]) for r in records(tmp_path) if "rewound_from" in r] == [(0, BAD)]
    assert read_checkpoint(tmp_path / "run" / "best").state.step in (20, 24)


@pytest.mark.parametrize("choice", [None, "stop"])
def test_numbers_that_are_not_finite_end_the_run_with_module_and_how_to_repeat_it(tmp_path, seen, choice, monkeypatch):
    seen.append(b"nan")
    trainer = make_trainer(tmp_path / "run", STEPS.replace(on_spike=choice))
    with pytest.raises(
        RuntimeError, match=rf"loss is nan .* at step {BAD}, .*first: h\.1\.mlp;.*run/bad-step-000016"
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value) and read_checkpoint(tmp_path / "run" / "last").state.step == 12
    folder = re.search(r"bad_step (\S+)", str(error.value))[1]
    assert "not finite first: h.1.mlp" in replay(folder)
    monkeypatch.undo()
    assert "everything is finite this time" in replay(folder)


def test_numbers_that_are_finite_when_the_step_is_repeated(tmp_path, monkeypatch):
    forward, calls = GPT.forward, []

    def once(self, ids, targets=None, **options):
        out, loss = forward(self, ids, targets, **options)
        calls.append(1)
        return out, loss * math.nan if len(calls) == 3 else loss

    monkeypatch.setattr(GPT, "forward", once)
    with pytest.raises(RuntimeError, match=r"at step 3, .*; not finite first: nothing when the step is repeated; "):
        make_trainer(tmp_path / "run", STEPS).train()


def test_stop_ends_the_run_at_a_spike_and_the_default_notes_it(tmp_path, seen):
    with pytest.raises(RuntimeError, match=rf"the loss is 2\d\.\d+, far above the 2\.\d+ .* at step {BAD}"):
        make_trainer(tmp_path / "run", STEPS.replace(on_spike="stop")).train()
    make_trainer(tmp_path / "run", STEPS, overwrite=True).train()
    assert [(r["step"], r["done"]) for r in records(tmp_path) if "wrong" in r] == [(BAD, "trained")]


def test_a_model_that_is_broken_itself_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path / "run", STEPS.replace(on_spike="skip"), SHAPE)
    with torch.no_grad():
        trainer.model.wte.weight[:] = math.inf
    with pytest.raises(RuntimeError, match="at step 10"):
        trainer.train()


def test_what_counts_as_wrong():
    quiet = [[3.0 + 0.01 * (n % 3), 1.0] for n in range(20)]
    assert not what_is_wrong(3.9, 10.0, quiet) and not what_is_wrong(100.0, 1e9, quiet[:9])
    assert "far above the 3.01" in what_is_wrong(4.2, 1.0, quiet)
    assert "norm of the gradient is 25" in what_is_wrong(3.0, 25.0, quiet)
    wide = [[float(value), 1.0] for value in np.random.default_rng(0).normal(3, 1, 50)]
    assert not what_is_wrong(8.0, 1.0, wide) and what_is_wrong(14.0, 1.0, wide)
    for value in (math.nan, math.inf):
        assert "is " + str(value) in what_is_wrong(value, 1.0, []) and what_is_wrong(1.0, value, [])
    assert beyond(8, 4, [[12, 4], [20, 4]]) == 8 and beyond(10, 4, [[12, 4], [16, 2]]) == 18
