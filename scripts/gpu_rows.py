"""A pytest plugin of `make gpu-check`: the tests that were collected, then one row of JSON a test as it ends, in GPU_ROWS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpu_steps import append

PATH = Path(os.environ["GPU_ROWS"])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Not of a worker of pytest-xdist; its controller collects nothing, and is told below."""
    if session.items and not hasattr(session.config, "workerinput"):
        append(PATH, {"plan": [item.nodeid for item in session.items]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: object, ids: list[str]) -> None:
    append(PATH, {"plan": list(ids)})


class Rows:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            append(PATH, row)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows())
