"""The loop with an objective of its own: a metric that decides, early stopping, resuming."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from gptfast.models import GPT
from gptfast.training import Evaluation, Loop, Objective, TrainConfig, read_checkpoint
from gptfast.training.log import read_log
from tests.support.training import QUICK, SHAPE

# Metrics of the evaluations at steps 3, 6, 9, …; the loss falls throughout, so it does not decide.
METRICS = [0.5, 0.7, 0.6, 0.7, 0.65, 0.6, 0.9]


class Scripted(Objective):
    """A GPT whose evaluations are written down."""

    metric, tokens_per_row = "accuracy", 4

    def __init__(self, model: GPT) -> None:
        self.network, self.rows = model, []

    def batches(self, row, config):
        self.rows.append(row)
        return [torch.full((2, 5), row % 7)]

    def add_gradients(self, batches, autocast, device):
        loss = sum(self.network(x[:, :-1], x[:, 1:])[1] for x in batches)
        loss.backward()
        return {"loss": float(loss.detach()), "task_loss": 0.5 * float(loss.detach())}

    def evaluate(self, batch_size, config, autocast, device):
        n = self.rows[-1] // config.rows_per_step + 1 if self.rows else 0
        return Evaluation(1 / (1 + n), METRICS[n // 3 - 1] if n else 0.25)


def loop(out: Path, config: TrainConfig, **options) -> Loop:
    resume = options.get("resume")
    torch.manual_seed(0)
    model = GPT(SHAPE) if resume is None else GPT.from_pretrained(resume.folder)
    return Loop(Scripted(model), config, out, progress=False, **options)


def test_the_metric_decides_which_step_is_best_and_ties_the_loss(tmp_path):
    result = loop(tmp_path, QUICK.replace(max_steps=12), evaluate_first=True).train()
    assert (result.best_step, result.best_metric, result.best_val_loss) == (12, 0.7, pytest.approx(1 / 13))
    found = [(r["step"], r["accuracy"]) for r in read_log(tmp_path / "log.jsonl") if "val_loss" in r]
    assert found == [(0, 0.25), (3, 0.5), (6, 0.7), (9, 0.6), (12, 0.7)]
    assert all("task_loss" in r for r in read_log(tmp_path / "log.jsonl") if "loss" in r)
    assert read_checkpoint(tmp_path / "best").state.best_metric == 0.7


def test_each_step_looks_whether_the_process_has_grown(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("gptfast.malloc.SteadyMemory.after_step", lambda self: steps.append(self))
    loop(tmp_path, QUICK.replace(max_steps=3)).train()
    assert len(steps) == 3 and len(set(map(id, steps))) == 1


def test_training_ends_after_too_many_evaluations_without_a_better_one(tmp_path):
    result = loop(tmp_path, QUICK.replace(max_steps=60, patience=2)).train()
    assert (result.steps, result.best_step) == (18, 12)  # 15 and 18 are no better than 12
    again = read_checkpoint(tmp_path / "last")
    with pytest.raises(ValueError, match=r"complete \(18 steps.*patience \(now 2\)"):
        loop(tmp_path, again.config, resume=again)
    assert loop(tmp_path, again.config, resume=again, finished_too=True).train().steps == 18
    assert loop(tmp_path, again.config.replace(patience=3, max_steps=21), resume=again).train().best_step == 21


def test_patience_and_the_best_metric_survive_a_resumption(tmp_path):
    whole = loop(tmp_path / "whole", QUICK.replace(max_steps=60, patience=2)).train()
    loop(tmp_path / "parts", QUICK.replace(max_steps=15, patience=2)).train()
    checkpoint = read_checkpoint(tmp_path / "parts" / "last")
    assert (checkpoint.state.stale, checkpoint.state.best_metric) == (1, 0.7)
    resumed = loop(tmp_path / "parts", QUICK.replace(max_steps=60, patience=2), resume=checkpoint).train()
    assert (resumed.steps, resumed.best_step, resumed.best_metric) == (whole.steps, whole.best_step, whole.best_metric)


def test_a_checkpoint_without_the_later_fields_is_read(tmp_path):
    import json

    from gptfast.training.checksums import own_checksum

    loop(tmp_path, QUICK.replace(max_steps=3)).train()
    file = tmp_path / "last" / "trainer.json"
    raw = json.loads(file.read_text())
    for name in ("best_metric", "stale", "evaluated"):
        del raw["state"][name]
    del raw["config"]["patience"]
    raw["files"]["trainer.json"] = own_checksum(raw)
    file.write_text(json.dumps(raw))
    found = read_checkpoint(tmp_path / "last")
    assert (found.state.stale, found.state.best_metric, found.config.patience) == (0, None, None)
    assert dataclasses.asdict(found.state)["step"] == 3
