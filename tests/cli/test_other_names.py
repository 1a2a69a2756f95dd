"""Names of options that users of nanoGPT, transformers and others would type are answered with ours."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from gptfast import cli
from gptfast._other_names import _THEIRS, likely
from gptfast.finetuning import finetune
from gptfast.training.run_file import read_options

COMMANDS = typer.main.get_command(cli._commands).commands


def said(*arguments: str) -> str:
    """What the command prints, in one line without the frame."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "300"})
    assert result.exit_code == 2, result.output
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


@pytest.mark.parametrize(
    ("command", "theirs", "ours"),
    [
        ("train", "--lr", "--learning-rate"),
        ("train", "--learning_rate", "--learning-rate"),
        ("train", "--batch_size", "--batch-size"),
        ("train", "--max_iters=10", "--max-steps"),
        ("train", "--num_train_epochs", "--max-steps"),
        ("train", "--gradient_accumulation_steps", "--grad-accum"),
        ("train", "--out_dir", "--out"),
        ("train", "--wandb_log=True", "--log-to"),
        ("train", "--model", "--init-from, --preset"),
        ("finetune", "--num_train_epochs", "--epochs, --max-steps"),
        ("finetune", "--lr", "--learning-rate"),
        ("generate", "--start", "--prompt"),
        ("generate", "--max_tokens", "--max-new-tokens"),
        ("prepare", "--num_proc", "--workers"),
    ],
)
def test_the_command_line_answers_with_our_name(command, theirs, ours):
    assert f"No such option: {theirs.partition('=')[0]} (Possible options: {ours})" in said(command, theirs, "3")


def test_a_name_that_means_nothing_here_gets_no_answer():
    assert "No such option: --num-workers" in (line := said("train", "--num-workers", "3")) and "Possible" not in line
    assert likely("--bf16", ["dtype", "beta1"]) == ["dtype"] and likely("zzz", ["dtype"]) == []


def test_arguments_without_an_option():
    assert "'runs/bard' is neither last nor auto; the folder of the run is --out" in said(
        "train", "--resume", "runs/bard"
    )
    assert "--data takes one file or folder" in said("train", "--data", "a.txt", "b.txt")


def test_keys_of_a_file_and_arguments_of_python(tmp_path):
    (tmp_path / "run.toml").write_text("lr = 1e-3\n")
    with pytest.raises(ValueError, match="unknown key lr; did you mean learning_rate\\?"):
        read_options(tmp_path / "run.toml")
    with pytest.raises(TypeError, match="no option 'num_train_epochs'; did you mean 'epochs' or 'max_steps'\\?"):
        finetune("model", "data.jsonl", num_train_epochs=3)


def test_each_of_our_names_is_an_option():
    ours = {parameter.name for command in COMMANDS.values() for parameter in command.params}
    assert set(_THEIRS) <= ours
