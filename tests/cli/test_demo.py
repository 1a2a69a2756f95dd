"""`make demo` and `gptfast doctor`: the first two commands that users run."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from gptfast import _busy, demo
from gptfast.backend import cpu_isas
from gptfast.cli import app
from gptfast.cli.doctor import report
from gptfast.machine import cpu_name


def small(options: list[str]) -> list[str]:
    """The demo's options, for a smaller model and six steps."""
    given = dict(zip(options[::2], options[1::2], strict=False))
    assert given["--data"] == demo.PLAYS
    text = " ".join(options)
    for name, value in {"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 32, "eval-batches": 1}.items():
        text, found = re.subn(rf"--{name} \d+", f"--{name} {value}", text)
        assert found == 1, name
    text, found = re.subn(r"--max-minutes [\d.]+", "--max-steps 6", text)
    assert found == 1
    return text.split(" ")


def test_the_demo_trains_writes_and_compares(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TRAIN", small(demo.TRAIN))
    assert demo.main() == 0
    said = capfd.readouterr().out
    for part in ("$ gptfast train", "best validation loss", "tokens/s", "loss curve", "generate    gptfast generate"):
        assert part in said, part
    assert all(f"---- temperature {t} " in said for t in demo.TEMPERATURES)
    assert said.count(demo.PROMPT) >= 3
    assert re.search(r"float32.*\n(.*\n)*.*bfloat16", said[said.index("---- speed") :])
    out = tmp_path / demo.OUT
    assert all((out / name).exists() for name in ("best", "last", "loss.png", "log.jsonl"))


@pytest.mark.parametrize(("waited", "said"), [(0.02, False), (0.5, True), (None, False)])
def test_the_demo_reports_a_busy_machine(tmp_path, monkeypatch, capfd, waited, said):
    """The times of the training's threads are made up: each second that they ran, they waited for so many."""
    clock = itertools.count(1)

    def times(pid):
        assert pid != "self"
        n = next(clock)
        return None if waited is None else (n * 10**9, int(n * 10**9 * waited / (1 - waited)))

    monkeypatch.setattr(_busy, "_times", times)
    monkeypatch.setattr(demo, "WATCH_SECONDS", 0.01)
    code, share = demo.train([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert code == 0 and (share is None if waited is None else share == pytest.approx(waited))
    monkeypatch.setattr(demo, "train", lambda command: (0, share))
    monkeypatch.setattr(demo, "write_samples", lambda: None)
    monkeypatch.setattr(demo, "compare", lambda: None)
    assert demo.main() == 0
    assert ("the machine is busy: for 50% of its time the training waited for a core" in capfd.readouterr().out) == said


def test_how_long_threads_wait_is_what_the_system_counts():
    """Two threads on one core wait for half of the time, and longer where others run there too."""
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("needs sched_setaffinity")
    code = """if True:
        import os, threading, time, zlib
        from gptfast._busy import CpuWait
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
        watch, data = CpuWait(), bytes(10**6)
        def work():
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                zlib.crc32(data)  # without the interpreter's lock
        threads = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in threads]; time.sleep(2); print(watch.share()); [t.join() for t in threads]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None" or float(done.stdout) > 0.4


def test_the_demo_ends_with_the_code_of_a_training_that_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TRAIN", ["--data", "no-such-file.txt"])
    assert demo.main() == 1


def test_doctor_reports_what_runs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = dict(report())
    assert rows["processor"] == f"{cpu_name()}, {torch.get_num_threads()} threads"
    assert f"Python {sys.version_info.major}.{sys.version_info.minor}" in rows["gptfast"]
    assert "compiled kernels" in rows["ops on the CPU"]
    assert rows["instruction sets"].startswith("scalar, ")
    assert rows["instruction sets"].startswith(", ".join(cpu_isas()))
    assert rows["ops on CUDA"].startswith("torch sees no GPU") or "compiled kernels for" in rows["ops on CUDA"]
    printed = CliRunner().invoke(app, ["doctor", "--seconds", "0"])
    assert printed.exit_code == 0
    for name, value in rows.items():
        assert name in printed.output
        assert value.split()[0] in printed.output


@pytest.mark.parametrize("reason", ["_ops.so was not built (GPTFAST_BUILD=0, or a source folder without a build)"])
def test_doctor_reports_why_kernels_are_absent(reason, monkeypatch):
    monkeypatch.setattr("gptfast.backend.has_cpu_ops", False)
    monkeypatch.setattr("gptfast.backend.missing_reason", reason)
    rows = dict(report())
    assert rows["ops on the CPU"] == f"eager PyTorch: {reason}"
    assert "instruction sets" not in rows
