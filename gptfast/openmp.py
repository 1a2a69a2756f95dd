"""The time that idle OpenMP threads spin before they sleep, which determines the speed on a busy machine."""

from __future__ import annotations

import os
import sys

SPINS = 10_000  # about 20 microseconds: longer than the gap between two ops, shorter than a time slice of the system


def bound_spinning(spins: int = SPINS) -> bool:
    """Let idle OpenMP threads sleep soon, in this process and its child processes.

    GNU's OpenMP, which torch uses, lets waiting threads spin for a long time, as if each had a core of its own. If another
    program runs on the same cores, threads with work wait for threads that spin: on two cores, with two other programs,
    training is 2.0 to 2.7 times faster with a bound (docs/notes/cpu.md). On a quiet machine the bound cost nothing on one
    CPU, and an eighth on another, where threads wake slowly. The bound is the environment variable GOMP_SPINCOUNT, which
    is read when torch is loaded:

        import gptfast.openmp
        gptfast.openmp.bound_spinning()      # before the first `import torch`
        import torch

    The command line calls this function. A GOMP_SPINCOUNT or OMP_WAIT_POLICY that the user has set is not changed.

    Args:
        spins: iterations of the waiting loop, >= 0.
    Returns:
        True if the bound is set and torch was not loaded before; False if torch is loaded or the user has set a value.
    Raises:
        ValueError: spins is negative.
    """
    if spins < 0:
        raise ValueError(f"bound_spinning: spins is {spins}; expected 0 or more")
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = str(spins)
    return "torch" not in sys.modules
