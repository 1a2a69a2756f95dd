"""`gptfast train --parallel fsdp` and `--tensor-parallel`: the losses of one process, the bits after a kill, and checkpoints for
any number of processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gptfast.models import GPT
from gptfast.training.log import read_log
from gptfast.training.parts import optimizer_parts
from tests.support.processes import (
    STEPS,
    await_step,
    finish,
    losses,
    ranks,
    stored_step,
    torchrun,
    train_command,
    workers,
)
from tests.support.train_command import gptfast

pytestmark = pytest.mark.slow
ROWS = ("--batch-size", "12")  # for two, three and four processes
FSDP = ("--parallel", "fsdp", *ROWS)
LAYERS = ("--tensor-parallel", "2")


@pytest.fixture(scope="module")
def alone(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in this process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert gptfast(*train_command(text, out, *ROWS)[2:]) == 0
    return out


def divided(processes: int, text: str, out: Path, *more: str) -> None:
    found = [finish(process) for process in ranks(processes, *train_command(text, out, *FSDP, *more))]
    assert [code for code, _ in found] == [0] * processes, found
    assert all(said == "" for _, said in found[1:])


@pytest.fixture(scope="module")
def two(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    divided(2, text, out)
    return out


def differences(a: Path, b: Path, name: str = "loss", steps: int = STEPS) -> list[float]:
    x, y = ({r["step"]: r[name] for r in read_log(o / "log.jsonl") if name in r and r["step"] <= steps} for o in (a, b))
    assert x.keys() == y.keys()
    return [abs(x[step] - y[step]) for step in x]


def files(out: Path) -> set[str]:
    return {path.name for path in (out / "last").iterdir()}


def test_divided_among_two_and_by_layers_among_four_a_run_has_the_losses_of_one(alone, two, text, tmp_path):
    divided(4, text, tmp_path / "four", *LAYERS, "--reshard", "step", "--recompute")
    for out in (two, tmp_path / "four"):
        assert max(differences(alone, out)) <= 1e-6
        assert max(differences(alone, out, "val_loss")) <= 1e-6
        assert max(differences(alone, out, "grad_norm")) <= 1e-5
        assert stored_step(out) == STEPS
        expected, got = (load_file(o / "last" / "model.safetensors") for o in (alone, out))
        assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in expected.items()}
        weights = [name for name in expected if name.endswith("weight")]  # a bias of keys has no gradient but rounding
        for name in weights:
            assert (got[name] - expected[name]).abs().max() <= 1e-5, name
    parts = {"optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"}
    assert files(two) == files(alone) - {"optimizer.safetensors"} | parts
    assert GPT.from_pretrained(two / "best").num_parameters() == GPT.from_pretrained(alone / "best").num_parameters()


def test_a_killed_rank_of_a_divided_run_costs_no_bits(two, text, tmp_path):
    out = tmp_path / "killed"
    agent = torchrun(2, *train_command(text, out, *FSDP, "--async-save"), restarts=2)
    await_step(out, 24, agent)
    os.kill(workers(agent)[1], signal.SIGKILL)
    code, said = finish(agent)
    assert code == 0, said
    assert losses(out) == losses(two)
    for name in files(two):
        if name.endswith(".safetensors"):
            a, b = load_file(out / "last" / name), load_file(two / "last" / name)
            assert a.keys() == b.keys()
            assert all(a[key].equal(b[key]) for key in a), name


def test_two_processes_one_and_three_go_on_from_each_other(alone, text, tmp_path, capsys):
    out = tmp_path / "mixed"
    both = ranks(2, *train_command(text, out, *FSDP, *LAYERS, "--keep-last", "2", "--max-steps", "30", "--async-save"))
    await_step(out, 12, both[0])
    both[1].send_signal(signal.SIGTERM)
    found = [finish(process, 25) for process in both]
    assert [code for code, _ in found] == [128 + signal.SIGTERM] * 2, found
    assert 12 <= stored_step(out) < 30
    resume = ["train", "--resume", "--out", str(out)]
    assert len(optimizer_parts(out / "last")) == 6  # of each process its part of queries, of keys and of values
    damaged = out / "last" / "optimizer-00002-of-00006.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"otherwise")
    assert gptfast(*resume, "--max-steps", "20", "--lr-decay-steps", str(STEPS)) == 0
    assert "damaged checkpoint" in capsys.readouterr().out
    assert "optimizer.safetensors" in files(out)
    three = ["-m", "gptfast", *resume, "--parallel", "fsdp", "--reshard", "pass", "--max-steps", "30"]
    found = [finish(process) for process in ranks(3, *three)]
    assert [code for code, _ in found] == [0] * 3, found
    assert max(differences(alone, out, steps=30)) <= 1e-6
    assert stored_step(out) == 30
    assert len(optimizer_parts(out / "last")) == 3
