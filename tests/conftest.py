"""Fixtures that every op's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault(
    "GPTFAST_GEMM", "own"
)  # here and in subprocesses: what runs must not depend on the machine's load

import emulated
import pytest
import torch

from gptfast.backend import AUTOMATIC, cpu_isas, force_cpu_isa
from gptfast.triton import INTERPRETING

if INTERPRETING:
    import triton_interpreter

    triton_interpreter.mend()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        op = metafunc.module.__name__.removeprefix("test_")
        emulator = ["emu"] if emulated.has_kernel(op) else []
        names = ["triton"] if INTERPRETING else cpu_isas() + emulator
        metafunc.parametrize("isa", names or ["eager"], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction set that was compiled in and runs here, and on the emulated CUDA kernels."""
    if request.param == "eager":
        pytest.skip("this install has no compiled ops")
    if request.param == "emu":
        request.getfixturevalue("emu")
        yield request.param
    elif request.param == "triton":
        yield request.param
    else:
        with force_cpu_isa(request.param):
            yield request.param


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under TRITON_INTERPRET=1 every test runs on the interpreted Triton kernels; tests/test_triton.py starts that."""
    if INTERPRETING:
        monkeypatch.setitem(AUTOMATIC, "cpu", ["triton"])


@pytest.fixture
def emu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the test on the emulated CUDA kernels only."""
    emulated.load()
    monkeypatch.setitem(AUTOMATIC, "cpu", ["emu", "cpu"])
    yield
    emulated.configure()


@pytest.fixture(params=["engine", "torch"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with the engine, which `GPT.generate` takes by itself on the CPU, and once without."""
    if request.param == "torch":
        monkeypatch.setattr("gptfast.engine.engine_for", lambda model: None)
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's thread count after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
