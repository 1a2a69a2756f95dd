"""How long threads of OpenMP spin before they sleep: it decides what a busy machine costs."""

from __future__ import annotations

import os
import sys

SPINS = 10_000  # some 20 microseconds: longer than the gap between two ops, shorter than a time slice of the system


def bound_spinning(spins: int = SPINS) -> bool:
    """Let the idle threads of OpenMP sleep soon, for this process and those that it starts.

    GNU's OpenMP, which torch computes with, lets threads that wait spin for a long time, as if each had a core of its
    own. Where another program runs on the same cores, the threads that have work then wait for the ones that spin: on
    two cores, with two other programs, training is 2.0 to 2.7 times faster with a bound (docs/notes/cpu.md). On a quiet
    machine it cost nothing on one CPU, and an eighth on another, where threads wake slowly. The bound is the environment
    variable GOMP_SPINCOUNT, which is read when torch is loaded:

        import gptfast.openmp
        gptfast.openmp.bound_spinning()      # before the first `import torch`
        import torch

    The command line does so by itself. A value of GOMP_SPINCOUNT or OMP_WAIT_POLICY that the user has set stays.

    Args:
        spins: turns of the waiting loop, at least 0.
    Returns:
        True when the bound is set and torch was not loaded before; False when it comes too late or the user has chosen.
    Raises:
        ValueError: spins is negative.
    """
    if spins < 0:
        raise ValueError(f"bound_spinning: spins is {spins}; expected 0 or more")
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = str(spins)
    return "torch" not in sys.modules
