"""The steps of `make gpu-check`: commands with a time limit, and what is known of one that is cut off."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
SECONDS = 470  # for a part
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_rows"]
BENCH = [sys.executable, "benchmarks/bench_gpu.py"]


def in_parallel(workers: int) -> list[str]:
    """pytest's options for so many processes, where pytest-xdist is installed and so many cores are there."""
    workers = min(workers, (os.cpu_count() or 1) // 2)
    return ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


class Check:
    """Runs the steps of a part one after the other and remembers how each went.

    head: written with every result. results: the folder of files of rows.
    """

    def __init__(self, part: str, head: dict[str, Any], trial: bool = False, results: Path | None = None) -> None:
        self.part, self.head, self.trial = part, head, trial
        self.results = results or (Path(tempfile.mkdtemp(prefix="gpu-check-")) if trial else RESULTS)
        self.results.mkdir(parents=True, exist_ok=True)
        self.trying = ["--try"] if trial else []
        self.begin = time.monotonic()
        self.outcomes: list[tuple[str, str, float]] = []

    def step(
        self, title: str, command: list[str], seconds: float, env: dict[str, str] | None = None, needed: bool = True
    ) -> str:
        """Runs a command of at most so many seconds. Returns "passed", "FAILED", or, where the time ran out, "FAILED: …" or,
        of what is not needed, "left out: …"."""
        start = time.monotonic()
        seconds = min(seconds * (10 if self.trial else 1), self.begin + SECONDS * (10 if self.trial else 1) - start)
        print(f"\n==== {title}: {' '.join(command)}", flush=True)
        outcome = "FAILED: no time was left"
        if seconds > 0:
            code = run(command, seconds, {**os.environ, **(env or {})})
            outcome = f"FAILED: not done after {seconds:.0f} s" if code is None else "FAILED" if code else "passed"
        if outcome.startswith("FAILED:") and not needed:
            outcome = outcome.replace("FAILED", "left out")
        self.note(title, outcome, time.monotonic() - start)
        return outcome

    def rows(self, title: str, command: list[str], seconds: float) -> None:
        """A step of benchmarks, whose rows are kept whatever becomes of it."""
        path = self.results / f"{self.part}.tried.jsonl" if self.trial else None
        out = ["--out", str(path), "--try"] if path else []
        self.step(title, [*command, *out], seconds)

    def tests(self, title: str, tests: list[str], seconds: float, env: dict[str, str] | None = None) -> None:
        """A step of tests: a row for each as it ends; says which were not reached."""
        path = self.results / f"gpu_tests_{self.part}.jsonl"
        begin = path.stat().st_size if path.exists() else 0
        place = f"{ROOT / 'scripts'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        outcome = self.step(
            title, [*PYTEST, *tests], seconds, {"PYTHONPATH": place, "GPU_ROWS": str(path), **(env or {})}
        )
        planned, done = tests_of(path, begin)
        if outcome != "passed" and (missing := sorted(planned - done)):
            print(f"{title}: {len(missing)} of {len(planned)} tests did not run: {', '.join(missing[:20])}", flush=True)

    def note(self, title: str, outcome: str, seconds: float = 0.0) -> None:
        self.outcomes.append((title, outcome, seconds))
        row = {"part": self.part, "step": title, "outcome": outcome, "seconds": round(seconds, 1), **self.head}
        append(self.results / "gpu_runs.jsonl", row)
        print(f"==== {title}: {outcome}, {seconds:.0f} s", flush=True)

    def report(self) -> int:
        failed = [title for title, outcome, _ in self.outcomes if outcome.startswith("FAILED")]
        print(f"\n{f'gpu-check {self.part}':36}{'seconds':>8}")
        for title, outcome, seconds in self.outcomes:
            print(f"{title:36}{seconds:>8.0f}  {outcome}")
        print(f"{'together':36}{time.monotonic() - self.begin:>8.0f}")
        print(f"gpu-check {self.part}: {'FAILED: ' + ', '.join(failed) if failed else 'everything passed'}", flush=True)
        return 1 if failed else 0


def run(command: list[str], seconds: float, env: dict[str, str]) -> int | None:
    """Its exit status; None where it was cut off, with the processes that it has started."""
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def tests_of(path: Path, begin: int) -> tuple[set[str], set[str]]:
    """The tests that were collected, and those that ended, in the rows from byte `begin` on."""
    rows = [json.loads(line) for line in path.read_bytes()[begin:].splitlines()] if path.exists() else []
    planned = {name for row in rows for name in row.get("plan", ())}
    return planned, {row["test"] for row in rows if "test" in row}
