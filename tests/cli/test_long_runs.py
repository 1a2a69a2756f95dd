"""gptfast train with the options of runs that take days."""

from __future__ import annotations

import json

import pytest
import tomlkit

from gptfast.models import GPT
from tests.support.train_command import gptfast

SHAPE = [
    "--tokenizer",
    "char",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "16",
    "--block-size",
    "16",
    "--device",
    "cpu",
]


def test_find_batch_size_keeps_the_rows_of_a_step_and_writes_what_it_found(text, tmp_path, capsys):
    out, options = tmp_path / "run", ["--batch-size", "2", "--grad-accum", "4", "--max-steps", "2"]
    assert gptfast("train", "--data", text, *SHAPE, *options, "--find-batch-size", "--out", out) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "batch 8 rows a pass, all of a step; 1 passes a step (--batch-size 8, --grad-accum 1)" in said
    kept = tomlkit.parse((out / "config.toml").read_text())
    assert (kept["batch_size"], kept["grad_accum"], kept["find_batch_size"]) == (8, 1, False)


def test_average_lion_growing_rows_and_drawing_from_one_file(text, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    out, file = tmp_path / "run", tmp_path / "run.toml"
    lines = [
        "ema = 0.9",
        'optimizer = "lion"',
        "sequence_warmup = 4",
        "tensorboard = true",
        "max_steps = 6",
        "eval_every = 3",
    ]
    file.write_text("\n".join([*lines, "log_every = 1", "batch_size = 2", ""]))
    assert gptfast("train", "--data", text, *SHAPE, "--config", file, "--out", out) == 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log] == list(range(1, 7)) and [r["step"] for r in log if "ema_val_loss" in r] == [3, 6]
    assert {"loss", "grad_norm", "seconds", "lr", "memory_gb"} <= set(log[-1])
    assert GPT.from_pretrained(out / "best-ema").config.n_layer == 1
    assert list((out / "tensorboard").iterdir())
    capsys.readouterr()
    assert gptfast("train", "--resume", "--out", out, "--ema", "0.5", "--max-steps", "8") == 1
    assert "--ema is 0.5 but the run in" in capsys.readouterr().err
    assert gptfast("train", "--resume", "--out", out, "--max-steps", "8") == 0


def test_a_recipe_takes_a_sequence_warm_up(tmp_path, capsys):
    assert gptfast("train", "--recipe", "gpt3-125m", "--sequence-warmup", "500", "--print-config") == 0
    printed = tomlkit.parse(capsys.readouterr().out)
    assert (printed["sequence_warmup"], printed["optimizer"], printed["schedule"]) == (500, "adamw", "cosine")
