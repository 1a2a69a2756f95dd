"""Training: schedule, decay groups, accumulation, resume bit for bit, checkpoints that survive, log and plot."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from gptfast import machine
from gptfast._snapshots import current
from gptfast.benchmarking.training_step import compare_step, eager_loss, gptfast_loss, torch_loss
from gptfast.cli import app
from gptfast.data import write_tokens
from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer, load_tokenizer
from gptfast.training import TrainConfig, Trainer, accumulate_gradients, read_checkpoint, timing
from gptfast.training.checkpoint import copy_checkpoint, save_checkpoint, verify
from gptfast.training.evaluate import evaluate, evaluated_tokens, evaluation_batches
from gptfast.training.log import Log, read_log
from gptfast.training.optim import build_optimizers, parameters_of
from gptfast.training.progress import Figures, TrainingProgress, clock
from gptfast.training.schedule import learning_rate
from gptfast.training.timing import RunClock

MUON = TrainConfig(optimizer="muon")
TEXT = "she sells sea shells by the sea shore. the shells she sells are sea shells, i am sure.\n" * 12
TOKENIZER = CharTokenizer.train(TEXT)
TOKENS = np.array(TOKENIZER.encode(TEXT), np.uint16)
TRAIN, VAL = TOKENS[:900], TOKENS[900:]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=TOKENIZER.vocab_size, dropout=0.1)
QUICK = TrainConfig(
    batch_size=4, max_steps=12, eval_every=3, eval_batches=2, log_every=1, dtype="float32", device="cpu"
)


def make_trainer(out: Path, config: TrainConfig = QUICK, shape: GPTConfig = SHAPE, **options) -> Trainer:
    torch.manual_seed(3)
    return Trainer(GPT(shape), TRAIN, VAL, config, out, tokenizer=TOKENIZER, progress=False, **options)


def resumed(out: Path, config: TrainConfig) -> Trainer:
    checkpoint = read_checkpoint(out / "last")
    model = GPT.from_pretrained(out / "last")
    return Trainer(model, TRAIN, VAL, config, out, tokenizer=TOKENIZER, progress=False, resume=checkpoint)


def timeless(path: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(path / "log.jsonl")]


# ---- configuration and schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected at least 1"),
        ({"grad_accum": 2.0}, TypeError, "grad_accum is 2.0; expected an int"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate is 0.0; expected a number > 0"),
        ({"learning_rate": math.nan}, ValueError, "learning_rate is nan"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1.0; expected a number in \[0, 1\)"),
        ({"min_lr": 1.0}, ValueError, "min_lr is 1.0 but learning_rate is 0.001"),
        ({"max_steps": None}, ValueError, "max_steps and max_minutes are both None"),
        ({"max_minutes": -1}, ValueError, "max_minutes is -1; expected a number > 0"),
        ({"dtype": "float16"}, ValueError, "dtype is 'float16'; expected one of auto, float32, bfloat16"),
        ({"optimizer": "sgd"}, ValueError, "optimizer is 'sgd'; expected one of adamw, muon"),
        ({"device": 0}, TypeError, "device is 0; expected a str"),
        ({"seed": 2**63}, ValueError, "seed is 9223372036854775808"),
        ({"steps": 5}, TypeError, "TrainConfig has no field 'steps'"),
    ],
)
def test_train_config_names_what_is_wrong(changes, error, message):
    with pytest.raises(error, match=message):
        TrainConfig().replace(**changes)


def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    config = TrainConfig(learning_rate=1.0, min_lr=0.2, warmup_steps=4, max_steps=24)
    rates = [learning_rate(step, config, 24) for step in range(30)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.6)  # half way
    assert rates[9] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(a > b for a, b in pairwise(rates[4:25]))
    assert rates[24:] == [0.2] * 6


@pytest.mark.parametrize(
    ("changes", "step", "total", "expected"),
    [
        ({}, 0, 2000, 1e-3 / 100),  # 100 steps of warm-up
        ({}, 0, 50, 1e-3 / 5),  # a tenth of 50
        ({"warmup_steps": 0}, 0, 50, 1e-3),
        ({}, 1999, math.inf, 1e-3),  # the end is not known yet
        ({}, 2000, 2000, 1e-4),
        ({"lr_decay_steps": 1000}, 1000, 2000, 1e-4),
        ({"lr_decay_steps": 4000, "warmup_steps": 0}, 2000, 2000, 5.5e-4),
    ],
)
def test_learning_rate_defaults(changes, step, total, expected):
    assert learning_rate(step, TrainConfig(**changes), total) == pytest.approx(expected)


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not():
    model = GPT(SHAPE)
    model.h[0].attn.c_attn.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, TrainConfig(weight_decay=0.3))
    decayed, others = ([names[id(p)] for p in g["params"]] for g in optimizer.param_groups)
    assert {n.split(".")[-2] for n in decayed} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert "h.0.attn.c_attn.weight" not in decayed
    assert all(n.endswith("bias") or ".ln_" in n or n.startswith("ln_f") for n in others)
    assert len(decayed) + len(others) == len(names) - 1
    assert len(set(decayed)) == len(decayed)  # the tied head is wte, once
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert all(g["fused"] and g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest():
    model = GPT(SHAPE)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = ([names[id(p)] for p in parameters_of([o])] for o in build_optimizers(model, MUON))
    assert sorted(adamw + muon) == sorted(names.values())
    assert {n.split(".")[-2] for n in muon} == {"c_attn", "c_proj", "c_fc"}
    assert not [n for n in muon if n.endswith("bias")]


def test_a_frozen_model_has_nothing_to_train():
    with pytest.raises(ValueError, match="no parameter of the model has requires_grad=True"):
        build_optimizers(GPT(SHAPE).requires_grad_(False), TrainConfig())


def _gradients(batches: list) -> tuple[float, list[torch.Tensor]]:
    torch.manual_seed(1)
    model = GPT(SHAPE.with_dropout(0.0)).train()
    loss = accumulate_gradients(model, batches)
    return loss, [p.grad for p in model.parameters()]


def test_accumulation_weighs_by_targets_so_that_the_split_into_batches_does_not_matter():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randint(SHAPE.vocab_size, (2, 8, 16), generator=generator).unbind()
    for row, kept in enumerate((16, 1, 3, 16, 0, 0, 2, 9)):  # two rows, and one batch, count nothing
        y[row, kept:] = -100
    loss, expected = _gradients([(x, y)])
    split_loss, split = _gradients(list(zip(x.split(2), y.split(2), strict=True)))
    assert split_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(split, expected, atol=1e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="every target is -100"):
        _gradients([(x, torch.full_like(y, -100))])


def test_grad_accum_sees_the_same_rows_as_a_larger_batch(tmp_path):
    shape = SHAPE.with_dropout(0.0)
    whole = make_trainer(tmp_path / "a", QUICK.replace(batch_size=8, grad_accum=1), shape)
    parts = make_trainer(tmp_path / "b", QUICK.replace(batch_size=2, grad_accum=4), shape)
    whole.train(), parts.train()
    torch.testing.assert_close(dict(whole.model.state_dict()), dict(parts.model.state_dict()), atol=2e-5, rtol=1e-3)


# ---- a run ----------------------------------------------------------------------------------------------------------


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


def test_a_complete_run_has_nothing_to_resume(tmp_path):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    with pytest.raises(ValueError, match=r"this run is complete \(3 steps.*raise max_steps \(now 3"):
        resumed(tmp_path, QUICK.replace(max_steps=3))


def test_a_run_is_not_overwritten_unasked(tmp_path):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    with pytest.raises(FileExistsError, match="already holds a training run"):
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


# ---- evaluation -----------------------------------------------------------------------------------------------------


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


# ---- checkpoints that survive ---------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Every write past so many bytes of a file fails, as on a full disk; only inside, as pytest writes its report too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path):
    trainer = make_trainer(tmp_path, QUICK.replace(max_steps=3))
    trainer.train()
    before = {f.name: f.read_bytes() for f in (tmp_path / "last").iterdir()}
    sizes = [(tmp_path / "last" / f"{name}.safetensors").stat().st_size for name in ("model", "optimizer")]
    fits_one = sum(sizes) // 2  # the model fits, the optimizer does not
    with file_size_limit(fits_one), pytest.raises(OSError, match=r"cannot write .*last.* is intact"):
        trainer._save()
    assert {f.name: f.read_bytes() for f in (tmp_path / "last").iterdir()} == before


def test_best_is_not_changed_by_later_saves_of_last(tmp_path):
    trainer = make_trainer(tmp_path)
    state = (trainer.tokenizer, trainer.state, trainer.config, {})
    save_checkpoint(tmp_path / "last", trainer.model, trainer.optimizers, *state)
    copy_checkpoint(tmp_path / "last", tmp_path / "best")
    before = {f.name: f.read_bytes() for f in (tmp_path / "best").iterdir()}
    with torch.no_grad():
        trainer.model.wte.weight.add_(1)
    save_checkpoint(tmp_path / "last", trainer.model, trainer.optimizers, *state)
    assert {f.name: f.read_bytes() for f in (tmp_path / "best").iterdir()} == before
    assert (tmp_path / "last" / "model.safetensors").read_bytes() != before["model.safetensors"]


_SAVE_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from gptfast.models import GPT, GPTConfig
from gptfast.training import TrainConfig
from gptfast.training.checkpoint import TrainState, copy_checkpoint, save_checkpoint
from gptfast.training.optim import build_optimizers, parameters_of
out, first = Path(sys.argv[1]), int(sys.argv[2])
model, config = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=64, block_size=8, vocab_size=500)), TrainConfig()
(optimizer,) = build_optimizers(model, config)
for p in model.parameters(): p.grad = torch.zeros_like(p)
optimizer.step()
for step in itertools.count(first):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
            optimizer.state[p]["exp_avg"].fill_(step)
    save_checkpoint(out / "last", model, [optimizer], None, TrainState(step=step), config, {})
    copy_checkpoint(out / "last", out / "best")
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    random, first = np.random.default_rng(11), 1
    for _ in range(4):
        command = [sys.executable, "-c", _SAVE_FOR_EVER, str(tmp_path), str(first)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            done = int(process.stdout.readline())
            time.sleep(random.uniform(0.0, 0.15))
            process.kill()
            done = max([done] + [int(line) for line in process.stdout])
        for name in ("last", "best"):
            step = read_checkpoint(tmp_path / name).state.step
            assert done <= step <= done + 1
            weights = GPT.from_pretrained(tmp_path / name).state_dict()
            assert all((w == step).all() for w in weights.values())
            moments = load_file(current(tmp_path / name, "optimizer.safetensors"))
            assert all((m == step).all() for key, m in moments.items() if key.startswith("exp_avg/"))
        first = step + 1


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _unsum(folder: Path) -> None:
    """Make a checkpoint one that has no checksums."""
    _edit(folder / "trainer.json", "files", {})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda f: _cut(f / "optimizer.safetensors"),
            ValueError,
            "optimizer.safetensors is not what was saved: its checksum",
        ),
        (
            lambda f: (_unsum(f), _cut(f / "optimizer.safetensors")),
            ValueError,
            "optimizer.safetensors is damaged or cut",
        ),
        (lambda f: (f / "optimizer.safetensors").unlink(), FileNotFoundError, "gptfast train --init-from"),
        (lambda f: _cut(f / "trainer.json"), ValueError, "trainer.json is not valid JSON"),
        (lambda f: _edit(f / "trainer.json", "version", 99), ValueError, "expected version 2"),
        (
            lambda f: _edit(f / "trainer.json", "state", {"step": 3}),
            ValueError,
            "trainer.json is damaged .trainer.json: state.planned_steps is missing",
        ),
        (lambda f: _edit(f / "trainer.json", "config", {"batch_size": -1}), ValueError, "batch_size is -1"),
        (lambda f: (f / "trainer.json").unlink(), FileNotFoundError, "no training run to resume"),
    ],
)
def test_a_damaged_checkpoint_is_an_error_with_the_cause(tmp_path, damage, error, message):
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    damage(tmp_path / "last")
    with pytest.raises(error, match=message):
        resumed(tmp_path, QUICK)


def _flip(path):
    """One bit in the middle of a file, as a worn-out disk or a bad copy flips it."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(tmp_path):
    make_trainer(tmp_path / "run", QUICK.replace(max_steps=3)).train()
    last = tmp_path / "run" / "last"
    names = sorted(f.name for f in last.iterdir())
    assert names == sorted(verify(last)) and {"trainer.json", "config.json", "optimizer.safetensors"} < set(names)
    assert read_checkpoint(tmp_path / "run" / "best").state.step == 3  # a copy with the same sums
    assert f"files: {len(names)}, as their" in CliRunner().invoke(app, ["info", str(last)]).output
    for name in names:
        copy = tmp_path / name
        shutil.copytree(last, copy)
        if name == "trainer.json":
            _edit(copy / name, "dropout", [0, 12345])
        else:
            _flip(copy / name)
        with pytest.raises(ValueError, match=rf"{name} is not what was saved: its checksum is .*; resume from another"):
            read_checkpoint(copy)
        assert CliRunner().invoke(app, ["info", str(copy)]).exit_code != 0
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            read_checkpoint(copy)


def test_a_checkpoint_without_checksums_is_resumed(tmp_path):
    """As written before there were any."""
    make_trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    _unsum(tmp_path / "last")
    assert verify(tmp_path / "last") == {}
    assert resumed(tmp_path, QUICK).state.step == 3


def test_the_optimizer_of_another_model_is_refused(tmp_path):
    make_trainer(tmp_path / "a", QUICK.replace(max_steps=3)).train()
    make_trainer(tmp_path / "b", QUICK.replace(max_steps=3), SHAPE.replace(n_embd=32)).train()
    _unsum(tmp_path / "a/last")
    (tmp_path / "b/last/optimizer.safetensors").replace(tmp_path / "a/last/optimizer.safetensors")
    with pytest.raises(ValueError, match=r"has shape .* the file belongs to another model"):
        resumed(tmp_path / "a", QUICK)


# ---- log, progress, comparison --------------------------------------------------------------------------------------


def test_a_log_that_cannot_grow_names_the_file(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    message = r"cannot write .*log.jsonl: .*; free some space and continue the run with `resume`"
    with file_size_limit(90), pytest.raises(OSError, match=message):
        _ = [log.write(step=step, loss=4.0) for step in range(1, 10)]  # 25 bytes each
    log.close()
    steps = [r["step"] for r in read_log(tmp_path / "log.jsonl")]
    assert steps == [1, 2, 3]  # the cut line is left out


def test_a_log_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n[1, 2]\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: the content is a list of 2; .* not a record"):
        Log(tmp_path / "log.jsonl", step=2)


def test_tensorboard_files_or_what_to_install(tmp_path):
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install tensorboard"):
            make_trainer(tmp_path, tensorboard=True)
    else:
        make_trainer(tmp_path, QUICK.replace(max_steps=3), tensorboard=True).train()
        assert list((tmp_path / "tensorboard").iterdir())


def test_without_a_terminal_progress_is_lines_of_known_figures():
    console = Console(file=io.StringIO(), width=200)
    with TrainingProgress(console=console) as progress:
        progress.show(Figures(1, None, 4.5, None, None, None, None))
        progress.show(Figures(2, 90, 4.4, 4.3, 1234.5, 41.2, 65.0))  # too soon after the first, and not important
        progress.show(Figures(3, 90, 4.25, 4.3, 1234.5, 41.2, 65.0), important=True)
    expected = ["step 1/?  loss 4.5000"]
    expected += ["step 3/90  loss 4.2500  val 4.3000  1,234 tokens/s  41% of peak  ETA 1:05"]
    assert console.file.getvalue().splitlines() == expected
    assert clock(3723) == "1:02:03"


@pytest.mark.parametrize("width", [40, 60, 80, 100, 132])
def test_the_bar_keeps_step_and_time_in_a_narrow_terminal(width):
    screen = io.StringIO()
    progress = TrainingProgress(console=Console(file=screen, force_terminal=True, width=width, highlight=False))
    with progress:
        progress.show(Figures(1850, 20000, 5.0412, 5.5646, 21997.0, 42.0, 65.0))
    last = screen.getvalue().split("\x1b[?25h")[0].splitlines()[-1]
    for part in ("1850/20000", "loss 5.0412", "ETA 1:05"):
        assert part in last, last
    assert "…" not in last
    shown = {60: "val 5.5646", 80: "21,997 tokens/s  ", 100: "42% of peak"}
    assert all(text.strip() in last for least, text in shown.items() if width >= least)


def test_percent_of_peak_is_never_above_100(tmp_path, monkeypatch):
    """A peak that was measured while the machine was busy is left out, and measured again at each evaluation."""
    measured = iter([1e3, 2e15, 1.0])
    monkeypatch.setattr(machine, "_measure_peak", lambda dtype, device: next(measured))
    monkeypatch.setattr(machine, "_peaks", {})
    trainer = make_trainer(tmp_path, QUICK.replace(max_steps=9, eval_every=7, eval_batches=1))
    figures = []
    monkeypatch.setattr(trainer.progress, "show", lambda shown, important=False: figures.append(shown))
    trainer.train()
    assert trainer.peak_flops == 2e15, "the largest of all measurements"
    shares = {f.step: f.percent_of_peak for f in figures}
    assert shares[6] is None, "more than the peak: the measurement was wrong"
    assert shares[8] is not None
    assert shares[8] <= 100


def test_the_step_that_is_compared_is_the_same_computation():
    model = GPT(SHAPE.with_dropout(0.0)).train()
    x, y = torch.randint(SHAPE.vocab_size, (2, 3, 16)).unbind()
    losses = [loss(model, x, y) for loss in (gptfast_loss, torch_loss, eager_loss)]
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for other in (1, 2):
        torch.testing.assert_close(losses[other], losses[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grads[other], grads[0], atol=1e-5, rtol=1e-3)


def test_compare_step_reports_every_implementation():
    comparison = compare_step(SHAPE, 2, rounds=2)
    assert list(comparison.milliseconds) == ["gptfast", *comparison.ratios]
    assert len(comparison.lines()) == 5
    with pytest.raises(ValueError, match="norm_position is 'post'; expected 'pre', as in GPT-2"):
        compare_step(SHAPE.replace(norm_position="post", final_norm=False), 2)


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
