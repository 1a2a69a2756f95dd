"""Fixtures that every op's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault(
    "GPTFAST_GEMM", "own"
)  # here and in subprocesses: what runs must not depend on the machine's load

import pytest
import torch

from gptfast.backend import cpu_isas, force_cpu_isa


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", cpu_isas() or ["eager"], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that was compiled in and runs here."""
    if request.param == "eager":
        pytest.skip("this install has no compiled ops")
    with force_cpu_isa(request.param):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
