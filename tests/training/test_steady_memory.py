"""gptfast.malloc.SteadyMemory: when holes of the heap are given back to the kernel."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest

from gptfast import malloc
from gptfast.malloc import SteadyMemory

MB = 1 << 20


@pytest.fixture
def memory(monkeypatch):
    """A SteadyMemory that looks at every step; `memory.held` is what the process holds, and half of it a trim gives back."""
    steady = SteadyMemory(every=1)

    def trim(pad):
        assert pad == 0
        steady.held //= 2

    steady.held, steady._trim = 400 * MB, trim
    monkeypatch.setattr(malloc, "_resident", lambda: steady.held)
    return steady


def test_growth_by_a_quarter_and_256_mib_is_given_back(memory):
    assert not memory.after_step()  # the first look
    memory.held = 755 * MB
    assert not memory.after_step()
    memory.held = 757 * MB
    assert memory.after_step() and memory.held < 400 * MB
    assert not memory.after_step()
    memory.held = 740 * MB  # 1.25 * 378.5 + 256 is 729
    assert memory.after_step()


def test_it_looks_every_so_many_steps(memory):
    memory._every = 4
    memory._most = 1
    assert [memory.after_step() for _ in range(8)] == [False, False, False, True, False, False, False, False]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_what_this_process_holds():
    # Mapped anew: malloc may hand out pages of a hole, which the process holds already.
    with mmap.mmap(-1, 64 * MB) as page_in:
        before = malloc._resident()
        page_in[::4096] = b"x" * len(range(0, 64 * MB, 4096))
        assert 48 * MB < malloc._resident() - before < 96 * MB
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        assert SteadyMemory()._trim(0) in (0, 1)


def test_another_c_library_is_left_alone(memory):
    memory._trim = None
    memory.held = 10000 * MB
    assert not any(memory.after_step() for _ in range(64))
