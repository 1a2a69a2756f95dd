"""Trainer: arguments and tokens that cannot be meant are refused before the first step."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast.models import GPT
from gptfast.training import Trainer
from tests.support.training import QUICK, SHAPE, TRAIN, VAL, make_trainer, resumed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_tokens": TRAIN.tolist()}, TypeError, "tokens are a list; expected a token file, or ids in an array"),
        ({"train_tokens": torch.tensor(TRAIN.astype(np.int64))}, TypeError, "tokens are a Tensor; expected"),
        ({"val_tokens": VAL.astype(np.float32)}, TypeError, "tokens are an array of float32 and shape"),
        ({"train_tokens": TRAIN.reshape(9, 100)}, TypeError, r"an array of uint16 and shape \(9, 100\)"),
        ({"train_tokens": TRAIN.astype(np.int64) - 3}, ValueError, r"tokens hold id -3; expected ids in \[0, 17\)"),
        ({"val_tokens": VAL + np.uint16(30)}, ValueError, r"tokens hold id \d\d; expected ids in \[0, 17\)"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model is Linear.* expected a GPT or a BERT"),
        ({"model": GPT}, TypeError, "expected a GPT or a BERT"),
        ({"config": {"max_steps": 3}}, TypeError, "config is {'max_steps': 3}; expected a TrainConfig"),
        ({"resume": "last"}, TypeError, "resume is 'last'; expected a Checkpoint"),
        ({"source": {"data": Path("a")}}, TypeError, "source cannot be written to a checkpoint"),
        ({"source": "a text"}, TypeError, "source is a str; expected a dict"),
        ({"log_to": "excel"}, ValueError, "log_to is 'excel'; expected one of 'tensorboard', 'wandb', 'trackio'"),
    ],
)
def test_what_is_wrong_is_named_before_a_step(tmp_path, changes, error, message):
    given = {"model": GPT(SHAPE), "train_tokens": TRAIN, "val_tokens": VAL, "config": QUICK, "out": tmp_path / "run"}
    with pytest.raises(error, match=f"Trainer: .*{message}" if "log_to" not in changes else message):
        Trainer(**{**given, **changes}, progress=False)
    assert not (tmp_path / "run" / "last").exists()
    Trainer(**{**given, "config": QUICK.replace(max_steps=1)}, progress=False).train()  # nothing is left locked


def test_an_array_on_the_disk_is_not_read_whole_for_it(tmp_path):
    np.array([*TRAIN, 40], np.uint16).tofile(tmp_path / "ids.bin")
    tokens = np.memmap(tmp_path / "ids.bin", np.uint16)
    Trainer(GPT(SHAPE), tokens, VAL, QUICK, tmp_path / "run", progress=False)


def test_a_run_that_was_ended_goes_on_in_another_trainer(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, QUICK)
    evaluate = trainer._evaluate
    monkeypatch.setattr(trainer, "_evaluate", lambda: [evaluate(), signal.raise_signal(signal.SIGTERM)])
    assert trainer.train().interrupted == signal.SIGTERM and trainer.state.step == 3
    with pytest.raises(RuntimeError, match="Trainer: the run was ended at step 3; continue it with a new Trainer"):
        trainer.train()
    again = resumed(tmp_path, QUICK)
    assert again.train().steps == again.train().steps == 12  # one that is complete has nothing to do
