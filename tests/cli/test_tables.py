"""Tables and commands to copy on a narrow terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from gptfast.benchmarking.self_test import OpResult
from gptfast.cli._problems import Problem
from gptfast.cli._tables import print_whole
from gptfast.cli.doctor import _print_tables


def test_no_cell_is_cut():
    table = Table("model", "word perplexity", box=None)
    for name in ("runs/a/long/name/of/a/run/best:int8", "runs/a/long/name/of/a/run/best:q4"):
        table.add_row(name, "902875.5475")
    text = io.StringIO()
    print_whole(Console(file=text, width=20), table)
    lines = text.getvalue().splitlines()
    assert [line.split()[0][-5:] for line in lines[1:]] == [":int8", "st:q4"] and "…" not in text.getvalue()
    assert all("902875.5475" in line for line in lines[1:])


def test_ops_and_commands_of_the_doctor_are_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = "export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864 [a]"
    result = OpResult("linear_cross_entropy", "bfloat16", "cpu", "kernels for avx512_bf16; products by its own kernel")
    _print_tables("a model", [("gptfast", "0")], [result], [Problem("[slow]", command)], 0.0)
    shown = capsys.readouterr().out.splitlines()
    assert f"  next: {command}" in shown and "problem: [slow]" in shown
    assert any(line.startswith("linear_cross_entropy ") for line in shown)
