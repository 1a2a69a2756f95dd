"""Numbers in config.json, which are compared with the tensors before anything of their size is built."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptfast.cli import app
from gptfast.models import GPT, GPTConfig

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=97, block_size=12)
HUGE = [10**7, 2**31, 2**32 + 12, 2**62, 2**63, 10**30, 10**400]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    GPT(SHAPE).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("value", HUGE, ids=lambda n: f"{float(n):.3g}" if n < 10**300 else "1e400")
@pytest.mark.parametrize("key", ["n_layer", "n_embd", "n_positions", "vocab_size", "n_inner", "n_head"])
def test_a_number_that_the_tensors_contradict(saved: Path, key: str, value: int):
    ours = {"n_positions": "block_size"}.get(key, key)
    change(saved, **{key: value})
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"config.json: .*\b({key}|{ours})\b") as caught:
        GPT.from_pretrained(saved)
    printed = CliRunner().invoke(app, ["info", str(saved)])
    assert time.perf_counter() - start < 5, "something of that size was built"  # a second, on a machine with other work
    assert str(saved) in str(caught.value)
    assert str(printed.exception) == str(caught.value)


@pytest.mark.parametrize("value", [10**8, 2**31 - 1])
def test_sinusoids_are_computed_and_bounded(tmp_path: Path, value: int):
    GPT(SHAPE.replace(position_embedding="sinusoidal")).save_pretrained(tmp_path)
    change(tmp_path, n_positions=value)
    with pytest.raises(
        ValueError, match=r"config.json: n_positions is \d+; expected at most 8388608 computed positions"
    ):
        GPT.from_pretrained(tmp_path)


def test_numbers_that_contradict_each_other_less_are_named_too(saved: Path):
    for key, value in {"n_embd": 8, "vocab_size": 96, "n_positions": 13, "n_inner": 63, "n_layer": 200}.items():
        content = (saved / "config.json").read_bytes()
        change(saved, **{key: value})
        with pytest.raises(
            ValueError, match=rf"config.json: {key} is {value}, but .*; use the config.json and the weights"
        ):
            GPT.from_pretrained(saved)
        (saved / "config.json").write_bytes(content)
    GPT.from_pretrained(saved)


def test_info_of_a_folder_without_weights_and_of_a_run(saved: Path):
    printed = CliRunner().invoke(app, ["info", str(saved)])
    assert printed.exit_code == 0 and "2 layers" in printed.output
    (saved / "model.safetensors").unlink()
    change(saved, n_layer=10**7)
    start = time.perf_counter()
    assert "10000000 layers" in CliRunner().invoke(app, ["info", str(saved)]).output
    assert time.perf_counter() - start < 5
