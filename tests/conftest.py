"""Fixtures that every op's tests share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

# Here and in subprocesses. What runs must not depend on the machine's load; and one thread of OpenMP is enough for tests
# that do not test threads: those that wait spin, and on a machine with other work that makes minutes into hours.
os.environ.setdefault("GPTFAST_GEMM", "own")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from packaging.requirements import Requirement

from gptfast.backend import AUTOMATIC, cpu_isas, force_cpu_isa
from gptfast.triton import INTERPRETING
from tests.support import ROOT, emulated

if INTERPRETING:
    from tests.support import triton_interpreter

    triton_interpreter.mend()


# Files of over a minute on a quiet machine, the longest first. pytest-xdist deals whole files in this order (the Makefile's
# --no-loadscope-reorder), so that the last ones are short and all processes end together.
SLOWEST_FIRST = (
    "cuda/test_cuda_build.py",  # nvcc compiles every kernel for every GPU
    "triton/test_triton.py",  # the op suite in Triton's interpreter
    "cuda_emulator/test_emulator_variants.py",  # two more builds of the emulator
    "cpu_kernels/test_cpu_kernels.py",  # every kernel for AVX-512 in words of AVX2, and under qemu
    "ops/test_causal_attention.py",
    "ops/test_layer_norm.py",
    "ops/test_cross_entropy.py",
    "benchmarking/test_bench.py",
    "training/test_training.py",
    "triton/test_triton_compile.py",
    "cuda/test_gpu_check.py",
    "fuzz/test_fuzz.py",
    "cli/test_demo.py",
    "cuda/test_conformance.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="fail where a package that tests need is missing")


def pytest_configure(config: pytest.Config) -> None:
    """`make test` asks for the whole suite: a missing package is an error there, elsewhere its tests are skipped."""
    missing = missing_packages() if config.getoption("--whole") else []
    if missing:
        raise pytest.UsageError(
            f"--whole: {', '.join(missing)} not installed, and the tests that need it would be skipped; "
            "install the packages of the tests: pip install --group test (pip 25.1 or newer)"
        )


def missing_packages(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """The names in the dependency group "test" that are not installed here, of those that this system should have."""
    [group] = re.findall(r"^test = \[\n(.*?)^\]", pyproject.read_text(encoding="utf-8"), re.M | re.S)
    wanted = [Requirement(line) for line in re.findall(r'^\s*"([^"]+)"', group, re.M)]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate()]
    return [r.name for r in here if not _installed(r.name)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a process of pytest-xdist
        items.sort(key=lambda item: rank(item.path))


def rank(path: Path) -> int:
    """The place of a test file in the order of dealing."""
    name = str(path.relative_to(ROOT / "tests")) if path.is_relative_to(ROOT / "tests") else ""
    return SLOWEST_FIRST.index(name) if name in SLOWEST_FIRST else len(SLOWEST_FIRST)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """In a test's name, the argument's name stands for bytes that are not ASCII.

    A file packed by gzip holds the time: two processes of pytest-xdist would collect different names, and run nothing.
    """
    return argname if isinstance(val, bytes) and not val.isascii() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        op = metafunc.module.__name__.rpartition(".")[2].removeprefix("test_")
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
    """Under TRITON_INTERPRET=1 every test runs on the interpreted Triton kernels; tests/triton/test_triton.py starts that."""
    if INTERPRETING:
        monkeypatch.setitem(AUTOMATIC, "cpu", ["triton"])


@pytest.fixture
def emu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the test on the emulated CUDA kernels only. New tensors are full of nan: a value that a kernel forgets shows."""
    emulated.load()
    monkeypatch.setitem(AUTOMATIC, "cpu", ["emu", "cpu"])
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    emulated.configure()


@pytest.fixture(params=["engine", "torch"])
def writer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with the engine, which `GPT.generate` takes by itself on the CPU, and once without."""
    if request.param == "torch":
        monkeypatch.setattr("gptfast.models.gpt.engine_for", lambda model: None)
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
