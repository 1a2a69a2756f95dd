"""gptfast train: options that change nothing without another one, or that contradict the plan."""

from __future__ import annotations

import pytest

from gptfast.training.options import check_effect
from tests.support.train_command import SMALL, gptfast


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
    check_effect({"decay_share": 0.2, "batch_warmup_from": 32_768, "reshard": "forward", "schedule": "cosine"})
    check_effect({"decay_share": 0.5, "schedule": "wsd", "reshard": "step", "tensor_parallel": 2})


def test_a_plan_says_that_the_rate_does_not_rise_and_that_one_process_shares_nothing(text, tmp_path, capsys):
    options = ["--warmup-steps", "8", "--learning-rate", "0.4", "--parallel", "fsdp", "--out", tmp_path / "run"]
    assert gptfast("train", "--data", text, *SMALL, "--max-steps", "2", *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the learning rate ends at 0.1 on its way to 0.4: --warmup-steps is 8" in printed
    assert "--parallel fsdp shares nothing in one process: torchrun" in printed
