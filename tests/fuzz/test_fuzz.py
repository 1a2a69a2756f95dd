"""A sample of `make fuzz` (tests/fuzz), and that it finds what is planted."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys

import pytest

from tests.fuzz import files, mutate, runner, server
from tests.support import ROOT


@pytest.mark.slow
def test_a_sample_finds_nothing():
    """Another minute of these, and of disks that fail, is tests/fuzz/test_disk_faults.py."""
    args = [sys.executable, "-m", "tests.fuzz", "files", "server", "ops", "--minutes", "0.3", "--seed", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(args, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+): (\d+) cases", done.stdout, re.M))
    assert counts.keys() == {"files", "server", "ops"} and min(map(int, counts.values())) >= 10, done.stdout


PLANTED = """
import os, sys, time
from tests.fuzz import runner

runner.SECONDS = 0.7

def make():
    def case(rng):
        how = rng.randrange(12)
        if how == 1:
            os.kill(os.getpid(), 11)
        if how == 2:
            time.sleep(1000)
        if how == 3:
            raise KeyError("id")
        if how == 4:
            bytearray(8 << 30)
        return "planted", "something" if how == 5 else None
    return case

report = runner.campaign("planted", make, 8, 3)
print(*report.findings, sep="\\n")
"""


@pytest.mark.slow
def test_the_runner_finds_what_is_planted():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PLANTED], env=env, capture_output=True, text=True, timeout=200)
    for finding in ("signal 11", "no end within 1 s", "the process ended with 1", "something"):
        assert f"{finding}\n    again: python -m tests.fuzz planted --seed 3 --case " in done.stdout, done.stderr
    assert "KeyError: 'id'" in done.stderr and "MemoryError" in done.stderr
    assert done.stdout.count("again:") == 4, "each kind once"


def test_what_a_reader_must_not_do_is_found(tmp_path):
    (tmp_path / "a.json").write_text("{}")

    def reading(call):
        return files.read_damaged(files.Files(lambda f: None, call), tmp_path, {"a.json": "values"})

    def fails(error):
        raise error

    for right in (ValueError("a.json: k is 5"), OSError(f"{tmp_path} is gone"), files.Unusable()):
        assert reading(lambda _, e=right: fails(e)) is None
    for wrong in (KeyError("k"), TypeError("a.json"), ValueError("k is 5"), MemoryError(), RuntimeError("a.json")):
        assert type(wrong).__name__ in reading(lambda _, e=wrong: fails(e))
    assert "KeyError" in reading(lambda folder: json.loads((folder / "a.json").read_text())["k"])


@pytest.mark.parametrize(
    ("status", "text", "match"),
    [
        (500, "{}", "status 500"),
        (302, "", "status 302"),
        (400, '{"error": {"message": "x"}}', "another shape"),
        (400, '{"error": {"message": "", "type": "a", "param": null, "code": null}}', "another shape"),
        (200, 'data: {"error": {}}\n\ndata: [DONE]\n\n', "an error inside"),
        (200, '{"choices": [NaN]}', "no JSON"),
    ],
)
def test_what_a_server_must_not_answer_is_found(status, text, match):
    assert match in server.wrong(status, text)
    assert server.wrong(200, '{"choices": []}') is None
    assert server.wrong(400, '{"error": {"message": "x", "type": "a", "param": null, "code": null}}') is None


def test_a_case_is_the_same_again():
    values = {"a": [1, {"b": "c"}], "d": 5}
    for n in range(200):
        one, two = (mutate.mutate_value(random.Random(f"7:{n}"), values, 3) for _ in range(2))
        assert repr(one) == repr(two)
    assert values == {"a": [1, {"b": "c"}], "d": 5}
    assert len({repr(mutate.mutate_value(random.Random(n), values)) for n in range(200)}) > 60
    assert runner.run_case(lambda: lambda rng: ("x", str(rng.random())), 3, 4) == str(random.Random("3:4").random())
