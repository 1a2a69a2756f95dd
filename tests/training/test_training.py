"""Runs: results, resuming bit for bit, time limits, and what a Trainer refuses; evaluation."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gptfast.data import write_tokens
from gptfast.models import GPT
from gptfast.tokenizer import load_tokenizer
from gptfast.training import Trainer, read_checkpoint, timing
from gptfast.training.evaluate import evaluate, evaluated_tokens, evaluation_batches
from gptfast.training.log import read_log
from gptfast.training.timing import RunClock
from tests.support.training import QUICK, SHAPE, TOKENIZER, TRAIN, VAL, make_trainer, resumed, timeless


def test_a_run_learns_and_leaves_checkpoints_log_and_plot(tmp_path):
    config = QUICK.replace(max_steps=120, learning_rate=1e-2, eval_every=50, log_every=10)
    result = make_trainer(tmp_path, config, SHAPE.with_dropout(0.0)).train()
    records = read_log(tmp_path / "log.jsonl")
    losses = {r["step"]: r["loss"] for r in records if "loss" in r}
    assert list(losses) == [1, *range(10, 121, 10)]
    assert losses[1] == pytest.approx(math.log(SHAPE.vocab_size), abs=0.3)
    assert losses[120] < 1.0
    assert [r["step"] for r in records if "val_loss" in r] == [50, 100, 120]
    assert (result.steps, result.best_step, result.interrupted) == (120, 120, None)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    best = GPT.from_pretrained(tmp_path / "best")
    batches = evaluation_batches(VAL, 16, 4, config.eval_batches)
    assert evaluate(best, batches, torch.no_grad, torch.device("cpu"))[0] == pytest.approx(
        result.best_val_loss, abs=1e-6
    )
    assert load_tokenizer(tmp_path / "best").encode("sea") == TOKENIZER.encode("sea")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["best", "last", "log.jsonl", "loss.png"]


def test_best_stays_behind_when_the_validation_loss_rises(tmp_path):
    trainer = make_trainer(tmp_path, QUICK.replace(max_steps=6))
    values = iter([2.0, 3.0])
    trainer._evaluate = lambda: _pretend(trainer, next(values))
    trainer.train()
    assert [read_checkpoint(tmp_path / name).state.step for name in ("best", "last")] == [3, 6]


def _pretend(trainer: Trainer, value: float) -> None:
    trainer._evaluated = trainer.state.step
    if value < (trainer.state.best_val_loss or math.inf):
        trainer.state.best_val_loss, trainer.state.best_step = value, trainer.state.step


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, dtype, optimizer):
    config = QUICK.replace(lr_decay_steps=12, grad_accum=2, dtype=dtype, optimizer=optimizer)
    make_trainer(tmp_path / "whole", config).train()
    make_trainer(tmp_path / "parts", config.replace(max_steps=6)).train()
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:  # steps that were made and lost, the last line cut short
        file.write('{"step": 7, "loss": 1.0}\n{"step": 8, "los')
    resumed(tmp_path / "parts", config).train()
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, parts = (load_file(tmp_path / run / "last" / name) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "parts")
    whole, parts = (read_checkpoint(tmp_path / run / "last") for run in ("whole", "parts"))
    assert parts.dropout == whole.dropout == (config.seed, 12 * 2)
    assert parts.state.best_val_loss == whole.state.best_val_loss


def test_a_batch_that_grows_is_the_same_after_a_resumption_and_counts_its_rows(tmp_path):
    config = QUICK.replace(grad_accum=4, batch_warmup_tokens=16 * 60, batch_warmup_from=64, schedule="wsd")
    whole = make_trainer(tmp_path / "whole", config)
    whole.train()
    passes = [1, 1, 1, 2, 2, 2, 3, 3]  # of 4 rows of 16 tokens, from 64 to 256 tokens over 960
    assert whole.state.rows == 4 * (sum(passes) + 4 * (12 - len(passes)))
    make_trainer(tmp_path / "parts", config.replace(max_steps=4, lr_decay_steps=12)).train()
    resumed(tmp_path / "parts", config.replace(lr_decay_steps=12)).train()
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_complete_run_has_nothing_to_resume(tmp_path):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    with pytest.raises(ValueError, match=r"this run is complete \(3 steps.*raise max_steps \(now 3"):
        resumed(tmp_path, QUICK.replace(max_steps=3))


def test_a_run_is_not_overwritten_unasked(tmp_path):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    with pytest.raises(FileExistsError, match="already has a training run"):
        make_trainer(tmp_path)
    make_trainer(tmp_path, overwrite=True)
    assert not (tmp_path / "last").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(tmp_path):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    trainer = resumed(tmp_path, QUICK)
    with torch.no_grad():
        trainer.model.wte.weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"the loss is nan .* at step 4, .* lower learning_rate"):
        trainer.train()
    assert read_checkpoint(tmp_path / "last").state.step == 3
    assert torch.isfinite(GPT.from_pretrained(tmp_path / "last").wte.weight).all()


def test_max_minutes_plans_the_steps_and_keeps_to_the_time(tmp_path, monkeypatch):
    """On a clock of its own, which goes 2 ms further at every look: a busy machine does not fail the test."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.002))
    minutes = 1.5 / 60
    config = QUICK.replace(max_steps=None, max_minutes=minutes, eval_every=20, log_every=5, min_lr=0.0)
    result = make_trainer(tmp_path, config).train()
    records = read_log(tmp_path / "log.jsonl")
    plans = [r["planned_steps"] for r in records if "planned_steps" in r]
    rates = [r["lr"] for r in records if "lr" in r]
    assert plans
    assert 30 * minutes < result.seconds < 60 * minutes + 0.05
    assert rates[-1] < 0.3 * config.learning_rate  # the cosine came down


def test_a_resumed_run_has_the_time_that_is_left(tmp_path, monkeypatch):
    """Two sessions together take what one alone does, and the log's seconds go on."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.01))
    config = QUICK.replace(max_steps=None, max_minutes=3 / 60, eval_every=20, log_every=1)
    whole = make_trainer(tmp_path / "whole", config).train()
    trainer = make_trainer(tmp_path / "parts", config)
    update = trainer._update

    def interrupted_update() -> dict[str, float]:
        if trainer.state.step == whole.steps // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update()

    monkeypatch.setattr(trainer, "_update", interrupted_update)
    first = trainer.train()
    second = resumed(tmp_path / "parts", config).train()
    assert first.interrupted == signal.SIGINT
    assert first.steps < whole.steps
    assert second.seconds == pytest.approx(whole.seconds, rel=0.1)
    assert second.steps == pytest.approx(whole.steps, abs=5)
    seconds = [record["seconds"] for record in read_log(tmp_path / "parts" / "log.jsonl") if "seconds" in record]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= 3


def test_run_clock_reserves_time_for_the_last_checkpoint(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = RunClock(before=10.0, limit=100.0, evaluation=4.0)
    for seconds in (5, 5, 5, *[1] * 10):
        with clock.step():
            now[0] += seconds
    assert clock.step_seconds == 1.0
    assert clock.more_steps() == 100 - 10 - 25 - 7  # 1.5 times the expected evaluation, and 1% of the limit
    with clock.pause():
        now[0] += 10
    assert clock.seconds == 10 + 25 + 10
    assert clock.seconds_per_step() == 2.0  # the pause is spread over the steps, the slow first three are left out
    assert clock.more_steps() == (100 - 45 - 16) // 2  # 1.5 times the measured pause, and 1%
    now[0] += 38.5
    assert clock.out_of_time


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 17}, "block_size is 17 but the model takes at most 16 tokens"),
        ({"device": "tpu"}, "device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, "device is 'meta'; expected 'auto', 'cpu' or 'cuda'"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but PyTorch sees"),
    ],
)
def test_trainer_refuses_what_does_not_fit(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, QUICK.replace(**changes))


def test_trainer_wants_float32_weights(tmp_path):
    with pytest.raises(TypeError, match=r"weights are torch.bfloat16; expected float32"):
        Trainer(GPT(SHAPE).bfloat16(), TRAIN, VAL, QUICK, tmp_path)


@pytest.mark.parametrize(("batches", "tokens"), [(0, len(VAL) - 1), (2, 2 * 4 * 16), (999, len(VAL) - 1)])
def test_evaluation_is_the_mean_over_the_tokens_it_claims(batches, tokens):
    model = GPT(SHAPE).train()
    model.dropout_seed = 3
    total, count = 0.0, 0
    for x, y in evaluation_batches(VAL, 16, 4, batches):
        logits = model.eval()(x).double().log_softmax(-1)
        kept = y != -100
        total -= logits[kept].gather(1, y[kept][:, None]).sum().item()
        count += int(kept.sum())
    model.train()
    loss, n = evaluate(model, evaluation_batches(VAL, 16, 4, batches), torch.no_grad, torch.device("cpu"))
    assert n == count == tokens == evaluated_tokens(VAL, 16, 4, batches)
    assert loss == pytest.approx(total / count, abs=1e-5)
    assert model.training
    assert model.dropout_step == 0


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_token_file_that_is_cut_short_while_training_is_named(tmp_path, name, monkeypatch):
    """It was SIGBUS."""
    parts = [write_tokens(tmp_path / part, [TRAIN], SHAPE.vocab_size) for part in ("train.bin", "val.bin")]
    config = QUICK.replace(max_steps=20, checkpoint_every=2, eval_every=5)
    trainer = Trainer(GPT(SHAPE), *parts, config, tmp_path / "run", progress=False)
    update = Trainer._update

    def update_and_cut(self):
        if self.state.step == 4:
            os.truncate(tmp_path / name, 100)
        return update(self)

    monkeypatch.setattr(Trainer, "_update", update_and_cut)
    with pytest.raises(OSError, match=rf"was changed, cut short or could not be read while it is in use.*{name}"):
        trainer.train()
    assert read_checkpoint(tmp_path / "run" / "last").state.step == 4
