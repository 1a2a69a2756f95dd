"""The emulator itself: mistakes of every kind are planted, and each is caught by the means that README.md promises."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest

from buildtools.ninja_file import Library, Unit, run_ninja
from tests.cuda_emulator.build import VARIANTS
from tests.support import ROOT, emulated

EMULATOR = ROOT / "tests/cuda_emulator"


@functools.cache
def program(variant: str) -> Path:
    """Compiled where it, its headers or the flags are other ones than the last time."""
    folder = ROOT / "build/planted" / variant
    flags = ["-std=c++20", "-fno-strict-aliasing", "-w", f"-I{emulated.cuda_include()}", *VARIANTS[variant]]
    emulator = ["-include", str(EMULATOR / "cuda_emulator.h"), "-x", "c++"]
    watched = ["-fsanitize=thread"] if variant == "race" else []
    units = [Unit(EMULATOR / "planted.cu", [*flags, *emulator, *watched], "planted.o")]
    units += [Unit(EMULATOR / "racecheck.cpp", flags, "racecheck.o")] * (variant == "race")
    link = [*VARIANTS[variant], "-lpthread", "-ldl"]
    run_ninja([Library("planted", units, link, program=True)], folder, folder)
    return folder / "planted"


def outcome(fault: str, variant: str = "plain", **environment: str) -> str:
    env = {**os.environ, **environment}
    result = subprocess.run([program(variant), fault], capture_output=True, text=True, check=False, env=env)
    return result.stdout + result.stderr


SUM = "no complaint: 2016"  # 0 + 1 + … + 63


@pytest.mark.parametrize("variant", ["plain", "race", "asan"])
@pytest.mark.parametrize("order", ["fwd", "rev", "rand"])
def test_a_correct_kernel_is_left_alone(variant, order):
    for copies in ("lazy", "eager"):
        assert outcome("correct", variant, EMU_ORDER=order, EMU_COPY=copies).strip() == SUM
        assert outcome("store_correct", variant, EMU_ORDER=order, EMU_COPY=copies).strip() == SUM


@pytest.mark.parametrize("order", ["fwd", "rev"])
def test_a_missing_barrier_reads_poison(order):
    """One warp runs as far ahead as it can, so it meets what the other has not written yet: nan."""
    assert "nan" in outcome("no_barrier", EMU_ORDER=order)
    assert "nan" in outcome("only_syncwarp", EMU_ORDER=order)
    assert "nan" in outcome("never_written", EMU_ORDER=order)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no_barrier", "RACE "),
        ("only_syncwarp", "RACE "),
        ("overwritten_too_early", "RACE "),
    ],
)
@pytest.mark.parametrize("order", ["fwd", "rev", "rand"])
def test_races_are_named_in_every_order(fault, message, order):
    text = outcome(fault, "race", EMU_ORDER=order)
    assert message in text and "warp 0" in text and "warp 1" in text and "planted+0x" in text, text


def test_stores_of_what_is_not_there_yet_or_no_more():
    """TMA reads shared memory when it likes: too early it finds nothing, too late what others wrote meanwhile."""
    assert "nan" in outcome("store_without_barrier", EMU_COPY="eager")
    assert outcome("store_overwritten", EMU_COPY="lazy").strip() == "no complaint: -64"


@pytest.mark.parametrize("copies", ["lazy", "eager"])
@pytest.mark.parametrize("order", ["fwd", "rev", "rand"])
def test_races_of_stores_are_named(order, copies):
    for fault in ("store_without_barrier", "store_overwritten"):
        text = outcome(fault, "race", EMU_ORDER=order, EMU_COPY=copies)
        assert "RACE " in text and "TMA store" in text, text
    assert "(no fence.proxy.async)" in outcome("store_without_fence", "race", EMU_ORDER=order, EMU_COPY=copies)


@pytest.mark.parametrize("products", ["lazy", "eager"])
@pytest.mark.parametrize("order", ["fwd", "rev", "rand"])
def test_races_of_products_are_named(order, products):
    """A wait for all groups but the last gives back what those groups read, and nothing of the last or of none."""
    mode = {"EMU_ORDER": order, "EMU_MMA": products}
    assert outcome("products_correct", "race", **mode).strip() == "no complaint: 0"
    for fault in ("products_overwritten", "products_not_committed"):
        text = outcome(fault, "race", **mode)
        assert "RACE " in text and "wgmma of warpgroup 0" in text, text


@pytest.mark.parametrize("order", ["fwd", "rev", "rand"])
def test_kernels_that_start_before_the_one_before_has_ended(order):
    assert outcome("early_correct", EMU_ORDER=order).strip() == SUM
    assert "nan" in outcome("early_reads", EMU_ORDER=order)
    assert "may start before this one has waited" in outcome("early_lets_go", EMU_ORDER=order)
    assert "ends without a wait for earlier kernels" in outcome("early_never_waits", EMU_ORDER=order)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent_barrier", "divergent barrier 0 inside warp 1: lines"),
        ("divergent_shuffle", "divergent warp collective __shfl_xor_sync: lines"),
        ("lanes_missing", "deadlock; thread 0 waits at __shfl_xor_sync"),
        ("lane_not_in_mask", "calling lane 8 is not in mask 0x000000ff"),
        ("trap", "thread (3,0,0)"),
        ("misaligned", "misaligned address"),
        ("stack_overflow", "emu: stack overflow: block (0,0,0) thread (32,0,0) used more than 128 KB"),
        ("bad_block", "emu: launch with a bad block size"),
        ("too_much_shared", "emu: launch with more than 227 KB of shared memory"),
        ("store_at_exit", "the thread ends while a TMA store may still read shared memory"),
        ("too_many_registers", "setmaxnreg: 3 warpgroups ask for 512 registers, 168 a thread were launched"),
    ],
)
def test_errors_that_need_no_tool(fault, message):
    text = outcome(fault)
    assert message in text, text


@pytest.mark.parametrize(
    ("fault", "message"), [("past_dynamic", "heap-buffer-overflow"), ("past_global", "heap-buffer-overflow")]
)
def test_reads_and_writes_past_the_end(fault, message):
    text = outcome(fault, "asan")
    assert message in text and "planted.cu:" in text, text
