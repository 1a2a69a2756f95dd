"""Ahead-of-time compilation of the Triton kernels for GPUs that are not here: whatever is launched is compiled instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# name -> target, and the shared memory that a program may have there (CUDA C Programming Guide, table of compute
# capabilities; AMD CDNA 3 ISA: 64 KB of LDS)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_86": (GPUTarget("cuda", 86, 32), 99 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


class _Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, name: str) -> None:
        self.target = TARGETS[name][0]
        self.device = list(TARGETS).index(name)  # Triton keeps compiled kernels by device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_for(name: str) -> Iterator[list[Any]]:
    """The kernels that are launched inside the `with`, compiled for a target and not run."""
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    before, driver._active = driver._active, _Driver(name)
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run, driver._active = run, before


def take_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each choice of tiles the first whose tiles are loaded by TMA."""
    from gptfast.triton import causal_attention, causal_attention_bwd

    def first_by_tma(kernel, shape_class, candidates, launch):
        return next(blocks for blocks in candidates if blocks.tma)

    for module in (causal_attention, causal_attention_bwd):
        monkeypatch.setattr(module, "fastest", first_by_tma)
