"""One run in several processes: the same losses for every number of them, and what a kill, a signal or a mistake does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gptfast.models import GPT
from tests.support.processes import (
    STEPS,
    await_step,
    finish,
    free_port,
    losses,
    ranks,
    stored_step,
    torchrun,
    train_command,
    workers,
)
from tests.support.train_command import gptfast

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(text: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run in 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    outs = {n: folder / str(n) for n in (1, 2, 4)}
    for n, out in outs.items():
        found = [finish(process) for process in ranks(n, *train_command(text, out))]
        assert [code for code, _ in found] == [0] * n, found
        assert all(said == "" for _, said in found[1:])  # one rank speaks
    return outs


def tensors(out: Path) -> dict:
    files = [load_file(out / "last" / name) for name in ("model.safetensors", "optimizer.safetensors")]
    return {**files[0], **files[1]}


def equal_bits(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(x[name].equal(y[name]) for name in x)


def test_every_number_of_processes_has_the_losses_of_one(runs):
    one = losses(runs[1])
    assert list(one) == list(range(1, STEPS + 1))
    for n in (2, 4):
        found = losses(runs[n])
        assert found.keys() == one.keys()
        assert max(abs(found[step] - one[step]) for step in one) <= 1e-6
        assert stored_step(runs[n]) == STEPS
        assert (
            GPT.from_pretrained(runs[n] / "last").num_parameters()
            == GPT.from_pretrained(runs[1] / "last").num_parameters()
        )


def test_a_killed_rank_costs_no_bits(runs, text, tmp_path):
    out = tmp_path / "killed"
    agent = torchrun(2, *train_command(text, out, "--parallel", "ddp"), restarts=2)
    await_step(out, 14, agent)
    os.kill(workers(agent)[1], signal.SIGKILL)
    code, said = finish(agent)
    assert code == 0, said
    assert "resume   from step" in said
    assert losses(out) == losses(runs[2])
    assert equal_bits(out, runs[2])


def test_a_signal_to_one_rank_saves_and_ends_all_and_one_process_goes_on(runs, text, tmp_path):
    out = tmp_path / "ended"
    both = ranks(2, *train_command(text, out, "--parallel", "ddp"))
    await_step(out, 6, both[0])
    both[1].send_signal(signal.SIGTERM)
    start = time.monotonic()
    found = [finish(process, 25) for process in both]
    assert time.monotonic() - start < 25
    assert [code for code, _ in found] == [128 + signal.SIGTERM] * 2, found
    step = stored_step(out)
    assert 6 <= step < STEPS
    assert "interrupted at step" in found[0][1]
    assert gptfast("train", "--resume", "--out", out) == 0
    one, mixed = losses(runs[1]), losses(out)
    assert mixed.keys() == one.keys()
    assert max(abs(mixed[n] - one[n]) for n in one) <= 1e-6


def test_a_signal_beside_a_dead_rank_saves_without_it(text, tmp_path):
    out = tmp_path / "hung"
    both = ranks(2, *train_command(text, out))
    await_step(out, 6, both[0])
    both[1].send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    both[0].send_signal(signal.SIGTERM)
    code, said = finish(both[0], 25)
    both[1].kill()
    both[1].communicate()
    assert code not in (0, None)
    assert "error: rank 0 of 2: a signal came, and rank 1 did not answer during" in said
    assert stored_step(out) >= 6


def test_a_batch_that_does_not_divide_is_one_error_with_both_numbers(text, tmp_path):
    found = [finish(process) for process in ranks(3, *train_command(text, tmp_path / "run"))]
    said = "".join(printed for _, printed in found)
    assert [code for code, _ in found] == [1] * 3
    assert said.count("error:") == 1
    assert "--batch-size is 8 but 3 processes share it" in said
    assert not (tmp_path / "run").exists()


def test_a_port_in_use_and_a_rank_that_never_comes_are_named(text, tmp_path, monkeypatch, capsys):
    import socket

    command = train_command(text, tmp_path / "run", "--timeout", "1")[2:]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert gptfast(*command) == 1
        assert f"port {taken.getsockname()[1]}, which is in use" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert gptfast(*command) == 1
    assert "rank 0 of 2 waited 1 s (--timeout), but rank 1 did not come" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    assert gptfast(*command) == 1
    assert "rank 1 of 2 found no rank 0 at 127.0.0.1" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "two")
    assert gptfast(*command) == 1
    assert "RANK is 'two'; expected a whole number" in capsys.readouterr().err


def test_a_signal_to_torchrun_ends_the_run_saved(text, tmp_path):
    agent = torchrun(2, *train_command(text, tmp_path / "run"))
    await_step(tmp_path / "run", 5, agent)
    agent.send_signal(signal.SIGTERM)
    code, _ = finish(agent, 25)
    assert code != 0
    assert 5 <= stored_step(tmp_path / "run") < STEPS
