"""benchmarks/bench_family.py: every part runs, and the last lines say which wishes were met."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source tree")
SMALL = {"rounds": 1, "batch": 2, "length": 32, "rows": 8, "tokens": 8, "experts": 4, "chosen": 2, "width": 32}


def test_every_part_runs_and_every_wish_is_judged(monkeypatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_family

    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["bench_family.py", *sizes, "--out", str(tmp_path / "rows.jsonl")])
    monkeypatch.setattr(bench_family, "peak_flops", lambda dtype: 1e12)  # which takes a second to measure
    bench_family.main()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["op"] for row in rows} >= {"attention", "rms_norm", "rotary", "swiglu", "moe", "moe, one token"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wanted")]
    assert len(said) == len(bench_family.WISHES)
    counted = {line.split("met by ")[1].split(",")[0] for line in said}
    assert {phrase.split(" of ")[1] for phrase in counted} == {"2 rows", "4 rows", "14 rows"}


def test_a_wish_is_met_or_not(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_family import judged

    rows = [
        {"op": "attention", "shape": f"T{n}", "dropout": p, "of_sdpa": n} for n, p in ((1.4, 0.1), (1.6, 0.1), (1, 0))
    ]
    [line] = judged(rows)
    assert "SDPA: 1.5 or more; met by 1 of 2 rows, the least 1.4 (attention  T1.4)" in line
