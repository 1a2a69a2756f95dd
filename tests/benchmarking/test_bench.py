"""gptfast bench: shares of the limit, and the lines that say where a peer is faster."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from gptfast import machine
from gptfast.benchmarking.busy import busy_loops
from gptfast.benchmarking.compare import COPY, Comparison, compare, comparisons, count_comparisons
from gptfast.benchmarking.report import losses, percent_of_limit, print_table, save_json
from gptfast.cli import app
from gptfast.machine import Machine
from gptfast.testing import Case

MACHINE = Machine("a machine", 2, "avx2", "2.13", fp32_gflops=200.0, bf16_gflops=400.0, copy_gbs=20.0, signal_ns=40.0)


def comparison(op: str, dims: dict[str, int], milliseconds: float, **ratios: float) -> Comparison:
    c = Comparison(Case(op, dims, {}), torch.float32, False, ours=lambda: None, peers={})
    c.ratios = {name.replace("_", " "): ratio for name, ratio in ratios.items()}
    c.milliseconds = {"ours": milliseconds, **{peer: milliseconds * r for peer, r in c.ratios.items()}}
    return c


def test_slower_results_are_listed(capsys):
    copy = {COPY.replace(" ", "_"): 0.5}
    results = [comparison("gelu", {"N": 64, "C": 32}, 1.0, torch=0.8, eager=2.0, **copy)]
    assert losses(results) == ["gelu N64C32 float32 fwd runs at 0.80 of the speed of torch"]
    print_table(results, MACHINE)
    assert "slower: gelu N64C32" in capsys.readouterr().out


def test_percent_of_the_limit():
    """linear: 2 M N K flops at 200 GFLOP/s; gelu: 2 N C values of 4 bytes at 20 GB/s."""
    flops = comparison("linear", {"N": 1000, "C": 1000, "M": 1000}, 20.0)
    share, what = percent_of_limit(flops, MACHINE)
    assert what == "flops" and share == pytest.approx(50, rel=0.01)
    share, what = percent_of_limit(comparison("gelu", {"N": 1000, "C": 1000}, 0.8), MACHINE)
    assert what == "memory" and share == pytest.approx(50, rel=0.01)


def test_percent_of_the_limit_is_never_above_100(monkeypatch, capsys):
    """It is left out where the limit was measured too small; a larger limit that is measured later counts."""
    fast = comparison("linear", {"N": 1000, "C": 1000, "M": 1000}, 5.0, torch=1.5)
    assert percent_of_limit(fast, MACHINE) == (None, "flops")
    print_table([fast], MACHINE)
    printed = capsys.readouterr().out
    assert "? flops" in printed and "?: above 100" in printed and "200 flops" not in printed
    monkeypatch.setattr(machine, "measure_machine", lambda: replace(MACHINE, fp32_gflops=500.0, bf16_gflops=1.0))
    again = MACHINE.measured_again()
    assert (again.fp32_gflops, again.bf16_gflops, again.copy_gbs) == (500.0, 400.0, 20.0)
    assert percent_of_limit(fast, again)[0] == pytest.approx(80, rel=0.01)


def test_the_limits_are_those_of_the_fastest_products(monkeypatch):
    """Also where torch multiplies by tiles, which our probe of registers does not reach."""
    monkeypatch.setattr(machine, "_peaks", {})
    monkeypatch.setattr(machine, "_gemm_flops", lambda dtype, device: 9e15)
    measured = machine.measure_machine()
    assert (measured.fp32_gflops, measured.bf16_gflops) == (9e6, 9e6)


def test_command(tmp_path, monkeypatch):
    """On a case of the size of a test: eager PyTorch takes seconds for a mask of those that are timed otherwise."""
    module = sys.modules["gptfast.benchmarking.compare"]
    monkeypatch.setattr(module, "bench_cases", lambda op: [Case(op, {"N": 64, "C": 96}, {"p": 0.1})])
    done = CliRunner().invoke(app, ["bench", "dropout", "--rounds", "3", "--busy", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0 and "1 busy loops beside" in done.output, done.output
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {r["op"] for r in found["results"]} == {"dropout"}
    assert all(r["milliseconds"]["ours"] > 0 for r in found["results"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_a_peer_whose_call_outlasts_the_rounds_is_called_once(monkeypatch, tmp_path, capsys):
    """Three rounds of it would take minutes where the CPU emulates bfloat16."""
    module = sys.modules["gptfast.benchmarking.compare"]
    now, calls = [0.0], []

    def call(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    c = comparison("gelu", {"N": 64, "C": 32}, 1.0)
    c.ours, c.peers = call("ours", 0.5), {"torch": call("torch", 1.0), "eager": call("eager", 20.0)}
    compare(c, rounds=3)
    assert [calls.count(name) for name in ("ours", "torch", "eager")] == [4, 4, 1]
    assert c.once == ["eager"] and c.ratios == pytest.approx({"torch": 2.0, "eager": 40.0})
    assert c.milliseconds == pytest.approx({"ours": 500.0, "torch": 1000.0, "eager": 20_000.0})
    compare(c, rounds=3, seconds=0.1)  # little time, as the self-test has, makes no single call the measure of a peer
    assert calls.count("torch") == 8 and c.once == ["eager"]
    print_table([c], MACHINE)
    printed = capsys.readouterr().out
    assert "20000.00, once" in printed and "1000.00, once" not in printed and "once: a call took longer" in printed
    save_json([c], MACHINE, tmp_path / "bench.json")
    assert json.loads((tmp_path / "bench.json").read_text())["results"][0]["timed_once"] == ["eager"]


def test_the_cases_are_counted_before_they_are_made(monkeypatch):
    module = sys.modules["gptfast.benchmarking.compare"]
    monkeypatch.setattr(module, "bench_cases", lambda op: [Case(op, {"N": 8, "C": 16}, {"p": 0.1})])
    monkeypatch.setattr(module, "check_case", lambda case, dtype: (0.0, 0.0))
    assert count_comparisons(["dropout"]) == len(list(comparisons(["dropout"]))) == 4


def test_busy_loops_run_beside_and_end_with_the_block():
    with busy_loops(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert [loop.returncode for loop in loops] == [-9, -9]


def test_unknown_op():
    done = CliRunner().invoke(app, ["bench", "gelo"])
    assert done.exit_code != 0 and "no op named gelo" in str(done.exception or done.output)
