"""The moving average of the weights: torch's own, evaluated, resumed to the bit and exported."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gptfast.models import GPT
from gptfast.tokenizer import load_tokenizer
from gptfast.training import Evaluation, TrainConfig
from gptfast.training.evaluate import evaluate, evaluation_batches
from gptfast.training.language_modelling import LanguageModelling
from gptfast.training.log import read_log
from tests.support.training import QUICK, TOKENIZER, VAL, make_trainer, resumed

EMA = QUICK.replace(ema=0.8, learning_rate=1e-2)


def test_the_average_is_that_of_torch_and_the_weights_keep_their_bits(tmp_path):
    make_trainer(tmp_path / "plain", EMA.replace(ema=0.0)).train()
    trainer = make_trainer(tmp_path / "run", EMA)
    theirs = AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    update = trainer._update
    trainer._update = lambda: [update(), theirs.update_parameters(trainer.model)][0]
    trainer.train()
    last = tmp_path / "run" / "last"
    kept = load_file(last / "ema.safetensors")
    for name, p in theirs.module.named_parameters():
        assert torch.equal(kept[name], p), name
    plain, ours = (load_file(tmp_path / run / "last" / "model.safetensors") for run in ("plain", "run"))
    assert all(torch.equal(plain[name], ours[name]) for name in plain)


def test_an_average_without_a_finite_loss_is_not_the_best_for_long(tmp_path, monkeypatch):
    found = iter([2.7, math.nan, 2.6, 2.5, 2.4, 2.6])  # of the weights and the average in turn
    monkeypatch.setattr(LanguageModelling, "evaluate", lambda *_: Evaluation(next(found)))
    trainer = make_trainer(tmp_path, EMA.replace(max_steps=9))
    trainer.train()
    assert (trainer.state.best_ema_loss, trainer.state.best_ema_step) == (2.5, 6)


def test_the_average_is_evaluated_and_its_best_is_a_model(tmp_path):
    trainer = make_trainer(tmp_path, EMA)
    trainer.train()
    losses = {r["step"]: r["ema_val_loss"] for r in read_log(tmp_path / "log.jsonl") if "ema_val_loss" in r}
    assert list(losses) == [3, 6, 9, 12]
    best = GPT.from_pretrained(tmp_path / "best-ema")
    batches = evaluation_batches(VAL, 16, 4, EMA.eval_batches)
    found = evaluate(best, batches, torch.no_grad, torch.device("cpu"))[0]
    assert found == pytest.approx(min(losses.values()), abs=1e-6)
    assert load_tokenizer(tmp_path / "best-ema").encode("sea") == TOKENIZER.encode("sea")
    assert not torch.equal(best.wte.weight, trainer.model.wte.weight)
    make_trainer(tmp_path, QUICK, overwrite=True)._release()
    assert not (tmp_path / "best-ema").exists()


def test_a_resumed_run_has_the_same_average(tmp_path):
    make_trainer(tmp_path / "whole", EMA.replace(lr_decay_steps=12)).train()
    make_trainer(tmp_path / "parts", EMA.replace(lr_decay_steps=12, max_steps=7)).train()
    resumed(tmp_path / "parts", EMA.replace(lr_decay_steps=12)).train()
    for file in ("last/ema.safetensors", "last/model.safetensors"):
        whole, parts = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    (tmp_path / "parts" / "last" / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ema.safetensors is missing"):
        resumed(tmp_path / "parts", EMA.replace(max_steps=14))


def test_a_step_that_is_left_out_does_not_count(tmp_path):
    trainer = make_trainer(tmp_path, EMA.replace(max_steps=3, eval_every=9, on_spike="skip"))
    gradients = trainer.objective.add_gradients
    trainer.objective.add_gradients = lambda *args: (
        gradients(*args) | ({"loss": float("nan")} if trainer.state.step == 1 else {})
    )
    trainer.train()
    assert trainer.average is not None and trainer.average.updates == 2


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match="ema is"):
        TrainConfig(ema=value)


def test_a_save_in_the_background_has_the_average_of_its_step(tmp_path):
    make_trainer(tmp_path / "now", EMA).train()
    make_trainer(tmp_path / "later", EMA, async_save=True).train()
    for file in ("last/ema.safetensors", "best-ema/model.safetensors"):
        now, later = (load_file(tmp_path / run / file) for run in ("now", "later"))
        assert all(torch.equal(now[name], later[name]) for name in now)
