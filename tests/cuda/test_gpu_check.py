"""`make gpu-check` and `make bench-gpu` without a GPU: every comparison runs with tiny shapes on the emulator, before
any GPU runs it; a part that is cut off keeps its rows and lists what is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import ROOT, emulated

# Parts of the benchmarks, and how many rows compare the CUDA kernels on trial.
PARTS = {"memory": 18, "packed": 12, "family": 14, "attention": 5, "training": 2, "decode": 6}
pytestmark = pytest.mark.skipif(not (ROOT / "csrc/cuda").exists(), reason="not run from the source tree")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    place = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "PYTHONPATH": place, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_steps

    return gpu_steps


@WITHOUT_GPU
@pytest.mark.parametrize("script", ["scripts/gpu_check.py", "benchmarks/bench_gpu.py"])
def test_without_a_gpu_nothing_is_claimed(script):
    result = run(script)
    assert result.returncode == 2 and "torch sees no NVIDIA GPU" in result.stdout, result.stdout + result.stderr


@pytest.mark.slow
def test_what_a_gpu_will_measure_runs(tmp_path):
    """Rows follow the plan of their part, and carry commit, date and GPU."""
    emulated.build()
    path = tmp_path / "tried.jsonl"
    result = run("benchmarks/bench_gpu.py", "--try", "--out", str(path))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    rows = lines(path)
    ours = {part: sum(row["part"] == part for row in rows if "gptfast" in row.get("ms", {})) for part in PARTS}
    assert ours == PARTS, result.stdout
    assert not [row for row in rows if "gptfast" in row.get("refused", {})]
    for part in ("ceilings", *PARTS, "tuning"):
        plan, *measured = [row for row in rows if row["part"] == part]
        assert plan["plan"] == [row["what"] for row in measured]
    assert all(row["date"] and row["gpu"] and "commit" in row and "kernels" in row for row in rows)
    compared = [row for row in rows if len(row.get("ms", {})) > 1]
    assert all(set(row["quartiles"]) == set(row["ms"]) for row in compared)


def test_a_part_that_breaks_keeps_its_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_gpu

    def breaks(bench):
        yield {"what": "a", "value": 1}
        assert [row.get("what") for row in lines(path)] == [None, "a"], "written before the next is measured"
        raise RuntimeError("out of memory")

    path = tmp_path / "results/gpu.jsonl"
    monkeypatch.setitem(bench_gpu.PARTS, "decode", bench_gpu.Part(lambda bench: ["a", "b", "c"], breaks))
    bench = bench_gpu.Bench(device="cpu", tiny=True)
    for _ in range(2):
        path.unlink(missing_ok=True)
        rows = bench_gpu.Rows(path, {"gpu": "G"})
        assert bench_gpu.run_part("decode", bench, rows) == ["decode"]
    expected = [
        {"part": "decode", "plan": ["a", "b", "c"], "gpu": "G"},
        {"part": "decode", "what": "a", "value": 1, "gpu": "G"},
    ]
    assert lines(path) == expected
    assert "decode: not measured: b, c" in capsys.readouterr().out


def code(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_failed_step_stops_no_other(steps, capfd, tmp_path):
    """It is reported at the end; so is one that takes too long, unless it is not needed. Each is a row of a file."""
    check = steps.Check("ops", {"gpu": "G", "commit": "abc", "date": "today"}, results=tmp_path)
    assert check.step("breaks", code("raise SystemExit(3)"), 60) == "FAILED"
    assert check.step("hangs", code("import time; time.sleep(60)"), 0.2).startswith("FAILED: not done")
    assert check.step("may hang", code("import time; time.sleep(60)"), 0.2, needed=False).startswith("left out")
    assert check.step("works", code(""), 60) == "passed"
    assert check.report() == 1
    told = capfd.readouterr().out
    assert "gpu-check ops: FAILED: breaks, hangs\n" in told and re.search(r"works +\d+  passed", told), told
    check.begin -= steps.SECONDS
    assert check.step("too late", code(""), 60) == "FAILED: no time was left"
    rows = lines(tmp_path / "gpu_runs.jsonl")
    assert [row["step"] for row in rows] == ["breaks", "hangs", "may hang", "works", "too late"]
    assert all(row["commit"] == "abc" and row["gpu"] == "G" and row["part"] == "ops" for row in rows)


@pytest.mark.slow
def test_what_is_cut_off_ends_with_what_it_started(steps, tmp_path):
    """A worker of pytest-xdist would keep the GPU."""
    mark = tmp_path / "still there"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert steps.run(code(parent), 1.0, dict(os.environ)) is None
    assert steps.run(code("import time; time.sleep(4)"), 20, dict(os.environ)) == 0
    assert not mark.exists()


@pytest.mark.slow
def test_tests_that_were_not_reached_are_named(steps, tmp_path, capfd):
    """Of a run of tests that is cut off: those that ended have their rows."""
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\ndef test_quick(): pass\n@pytest.mark.skip\ndef test_skipped(): pass\n"
        "def test_hangs(): time.sleep(90)\ndef test_never(): pass\n"
    )
    check = steps.Check("ops", {"gpu": "G"}, results=tmp_path / "results")
    check.tests("some", [str(tmp_path / "test_some.py"), f"--rootdir={tmp_path}", "-c", os.devnull], 12)
    told = capfd.readouterr().out
    rows = lines(tmp_path / "results/gpu_tests_ops.jsonl")
    assert [(row["test"].split("::")[-1], row["outcome"]) for row in rows if "test" in row] == [
        ("test_quick", "passed"),
        ("test_skipped", "skipped"),
    ]
    assert "some: 2 of 4 tests did not run" in told and "test_hangs" in told and "test_never" in told, told


@pytest.mark.slow
@WITHOUT_GPU
@pytest.mark.parametrize("part", ["profile", "triton"])
def test_parts_run_on_trial(part):
    """Every command of a part, with all its options."""
    emulated.build()
    result = run("scripts/gpu_check.py", "--try", part)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert f"gpu-check {part}: everything passed" in result.stdout


@pytest.mark.slow
def test_small_calls_reach_every_operator(monkeypatch):
    """What compute-sanitizer and Nsight Compute look at: all that csrc/cuda has, by every format of packed weights."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_small
    from torch.utils._python_dispatch import TorchDispatchMode

    import gptfast
    from gptfast import _schemas
    from gptfast.ops._quantized_checks import FORMATS

    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.name())
            return func(*args, **(kwargs or {}))

    emulated.load()
    with gptfast.backend("emu"), Seen():
        gpu_small.calls("cpu", real=False)
    schemas = [x for op, of_op in _schemas.KERNELS.items() if emulated.has_kernel(op) for x in of_op]
    names = {_schemas.name_of(schema) for schema in (*_schemas.CUDA_KERNELS, *schemas)}
    inside = {"cross_entropy_in_place"}  # called by an operator written in Python, into which the mode does not look
    assert len(names) > 25 and {name for name in names if f"{emulated.NAMESPACE}::{name}" not in seen} == inside
    assert any(name.startswith("gptfast::linear_cross_entropy") for name in seen)
    assert set(gpu_small.FORMATS) == set(FORMATS)


def test_the_notes_say_when_the_gpu_tests_last_ran(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check

    last = gpu_check.last_run(ROOT / "benchmarks/results/gpu_runs.jsonl")
    assert f"The GPU tests last ran: {last}." in (ROOT / "docs/notes/cuda.md").read_text()


def test_the_last_run_is_one_that_passed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import gpu_check

    path = tmp_path / "gpu_runs.jsonl"
    assert gpu_check.last_run(path) == "never"
    rows = [
        ("ops", "every op on the GPU", "passed", 1),
        ("ops", "every op on the GPU", "FAILED", 2),
        ("speed", "x", "passed", 3),
    ]
    for part, step, outcome, day in rows:
        row = {"part": part, "step": step, "outcome": outcome, "date": f"day {day}", "gpu": "G", "kernels": "abc"}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    assert gpu_check.last_run(path) == "day 1, G, kernels of abc"
