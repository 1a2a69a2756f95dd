"""The CPU kernels against plain loops in double, by a program that needs no torch: here, and for AArch64 under qemu."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptfast.backend import cpu_isas
from tests.support import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not run from the source tree"),
]
CROSS = "aarch64-linux-gnu-g++"
MARGIN = 0.04  # of the best token's logit before the second: far above what instruction sets differ by


@functools.cache
def built(compiler: str, name: str, *options: str) -> Path:
    command = [sys.executable, "setup.py", "-q", "build_checks", *options]
    environment = {**os.environ, "CXX": compiler}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return ROOT / f"build/checks/{name}/checks{'-emulated' if options else ''}"


@functools.cache
def written(*command: str) -> dict[str, dict[str, str]]:
    """The greedy tokens by instruction set and format, after all checks of the instruction sets have passed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    tokens: dict[str, dict[str, str]] = {}
    for isa, checks in re.findall(r"checked (\w+): \d+ values in (\d+) checks, 0 failed", result.stdout):
        assert int(checks) > 1000
        tokens[isa] = {}
    for isa, form, row, margin in re.findall(r"tokens (\w+) (\w+ \w+) ([\d ]+) margin ([\d.]+)", result.stdout):
        assert float(margin) > MARGIN
        tokens[isa][form] = row
    return tokens


def here(*options: str) -> dict[str, dict[str, str]]:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    name = "-".join(os.uname()[i] for i in (4, 0)).lower()
    return written(str(built("g++", name, *options)))


@functools.cache
def on_aarch64(cpu: str) -> dict[str, dict[str, str]]:
    missing = [tool for tool in (CROSS, "qemu-aarch64") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} (apt-get install g++-aarch64-linux-gnu qemu-user)")
    return written("qemu-aarch64", "-cpu", cpu, str(built(CROSS, "aarch64-linux")))


def test_kernels_of_this_machine():
    tokens = here()
    emulated = [*cpu_isas(), *(["amx"] if cpu_isas()[-1:] == ["avx512_bf16"] else [])]
    assert list(tokens) == emulated or not cpu_isas()
    first, *others = tokens.values()
    assert len(first) == 10  # formats of weights and of the cache
    assert all(other == first for other in others)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX-512 is of x86-64")
@pytest.mark.skipif(
    "avx512_bf16" in cpu_isas(), reason="this machine has AVX-512, and test_kernels_of_this_machine its kernels"
)
def test_kernels_for_avx512():
    """With its vectors, and AMX's tiles, in C++: on a machine that has AVX2 alone."""
    tokens = here("--emulated")
    assert list(tokens) == ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]
    first, *others = tokens.values()
    assert all(other == first for other in others)


def test_kernels_of_aarch64():
    """Every instruction set, and the engine writes the tokens of this machine."""
    tokens = on_aarch64("max")
    assert list(tokens) == ["scalar", "neon", "neon_dotprod", "neon_bf16"]
    expected = next(iter(here().values()))
    for isa, of_isa in tokens.items():
        assert of_isa == expected, isa


@pytest.mark.parametrize(("cpu", "best"), [("cortex-a72", "neon"), ("neoverse-n1", "neon_dotprod")])
def test_older_processors_get_what_they_have(cpu, best):
    """ARMv8.0, and one with dot products alone: the program lists what it would run, and runs the best."""
    on_aarch64("max")
    program = str(built(CROSS, "aarch64-linux"))
    listed = subprocess.run(
        ["qemu-aarch64", "-cpu", cpu, program, "--list"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.split()[-1] == best
    assert list(written("qemu-aarch64", "-cpu", cpu, program, best)) == [best]
