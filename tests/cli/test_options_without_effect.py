"""gptfast train: options that change nothing without another one, or that contradict the plan."""

from __future__ import annotations

import json
import re

import pytest
import torch

from gptfast.training import TrainConfig, read_checkpoint
from gptfast.training.checksums import TRAINER, own_checksum
from gptfast.training.options import check_effect
from tests.support.train_command import SMALL, gptfast
from tests.support.training import QUICK, make_trainer, resumed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--decay-share", "0.5"],
            "--decay-share is 0.5, but has no effect without --schedule wsd; give it too, or leave",
        ),
        (["--sequence-warmup-from", "4"], "--sequence-warmup-from is 4, but has no effect without --sequence-warmup;"),
        (["--batch-warmup-from", "64"], "--batch-warmup-from is 64, but has no effect without --batch-warmup-tokens;"),
        (["--reshard", "step", "--parallel", "ddp"], "--reshard is step, but has no effect without --parallel fsdp;"),
    ],
)
def test_options_that_would_change_nothing_are_refused(text, tmp_path, capsys, options, message):
    for more in ([], ["--print-config"]):
        assert (
            gptfast("train", "--data", text, *SMALL, "--max-steps", "2", *options, "--out", tmp_path / "run", *more)
            == 1
        )
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_defaults_that_a_file_of_options_lists_are_no_choice():
    check_effect({"reshard": "forward"})
    check_effect({"reshard": "step", "tensor_parallel": 2})
    TrainConfig(decay_share=0.2, batch_warmup_from=32_768, schedule="cosine")
    TrainConfig(decay_share=0.5, schedule="wsd", sequence_warmup=2, sequence_warmup_from=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay_share": 0.5}, "`decay_share` is 0.5, but has no effect without `schedule` wsd"),
        (
            {"sequence_warmup_from": 4},
            "no effect without `sequence_warmup`; give it too, or leave `sequence_warmup_from` out",
        ),
        ({"batch_warmup_from": 64}, "`batch_warmup_from` is 64, but has no effect without `batch_warmup_tokens`"),
        (
            {"objective": "mlm", "router_aux_loss_coef": 0.1},
            "`router_aux_loss_coef` is for `objective` 'lm', and it is 'mlm'",
        ),
    ],
)
def test_a_configuration_in_python_refuses_them_too(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**changes)


def test_a_checkpoint_of_a_version_that_took_them_can_be_resumed(tmp_path):
    whole = make_trainer(tmp_path / "whole", QUICK.replace(max_steps=6))
    make_trainer(tmp_path / "run", QUICK.replace(max_steps=3)).train()
    file = tmp_path / "run" / "last" / TRAINER
    stored = json.loads(file.read_text())
    stored["config"] |= {"decay_share": 0.5, "batch_warmup_from": 64}
    stored["files"][TRAINER] = own_checksum(stored)
    file.write_text(json.dumps(stored))
    old = read_checkpoint(file.parent)
    assert (old.config.decay_share, old.config.batch_warmup_from) == (0.2, 32_768)
    assert resumed(tmp_path / "run", QUICK.replace(max_steps=6)).train().steps == whole.train().steps == 6


def test_a_batch_that_cannot_grow_and_a_rate_that_drops_are_said(text, tmp_path, capsys):
    options = [
        "--batch-warmup-tokens",
        "500",
        "--batch-warmup-from",
        "8",
        "--lr-decay-steps",
        "1",
        "--warmup-steps",
        "1",
    ]
    assert gptfast("train", "--data", text, *SMALL, "--max-steps", "2", *options, "--out", tmp_path / "run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "--batch-warmup-from is 8 tokens, but a pass has" in printed
        and "and a step is one: see --batch-size" in printed
    )
    assert "drops to 0.0002 at once after 2 steps: --lr-decay-steps is 1, and --warmup-steps 1" in printed


def test_more_threads_than_cores_are_said_and_thousands_refused(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gptfast._busy.os.sched_getaffinity", lambda pid: {0})
    command = ("train", "--data", text, *SMALL, "--max-steps", "1", "--out", tmp_path / "run", "--threads")
    before = torch.get_num_threads()
    try:
        assert gptfast(*command, "10000") == 1
        assert "--threads is 10,000, but this machine has 1 cores" in capsys.readouterr().err
        assert torch.get_num_threads() == before and not (tmp_path / "run").exists()
        assert gptfast(*command, "2") == 0
        assert "2 threads on 1 cores" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_a_plan_says_that_the_rate_does_not_rise_and_that_one_process_shares_nothing(text, tmp_path, capsys):
    options = ["--warmup-steps", "8", "--learning-rate", "0.4", "--parallel", "fsdp", "--out", tmp_path / "run"]
    assert gptfast("train", "--data", text, *SMALL, "--max-steps", "2", *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the learning rate ends at 0.1 on its way to 0.4: --warmup-steps is 8" in printed
    assert "--parallel fsdp shares nothing in one process: torchrun" in printed
