"""Checkpoints of a run: failed and killed saves, damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gptfast._snapshots import current
from gptfast.cli import app
from gptfast.models import GPT
from gptfast.training import read_checkpoint
from gptfast.training.checkpoint import copy_checkpoint, save_checkpoint, verify
from tests.support.training import QUICK, SHAPE, file_size_limit, make_trainer, resumed


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
from gptfast.training.checkpoint import copy_checkpoint, save_checkpoint
from gptfast.training.train_state import TrainState
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
    assert f"files: {len(names)}, all match their checksums" in CliRunner().invoke(app, ["info", str(last)]).output
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
