"""Puts the table, the JSON and the plot of the ratios after a pytest-benchmark run."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptfast.benchmarking import measure_machine, print_table, save_json, save_plot

RESULTS = []


@pytest.fixture(scope="session")
def machine():
    return measure_machine()


@pytest.fixture
def record_result():
    return RESULTS.append


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not RESULTS:
        return
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    machine = measure_machine()
    print()
    print_table(RESULTS, machine)
    save_json(RESULTS, machine, out / "bench.json")
    save_plot(RESULTS, machine, out / "bench.png")
    print(f"wrote {out / 'bench.json'} and {out / 'bench.png'}")
