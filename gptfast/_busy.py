"""Detecting a busy machine: the time that threads of a process wait for a core, from Linux' scheduler."""

from __future__ import annotations

import os
from pathlib import Path

# Part of the time. On a quiet machine it is a few hundredths; with one thread more than two cores it is a third.
BUSY = 0.15
_LEAST = 1e9  # nanoseconds of work below which there is no result


class CpuWait:
    """Measures the waiting time of a process from its construction on.

    Args:
        pid: the process; "self": this one.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._ran, self._waited = _times(pid) or (0, 0)

    def share(self) -> float | None:
        """The part of the runnable time in which threads waited for a core; None: measured too little, or unknown."""
        now = _times(self._pid)
        if now is None:
            return None
        ran, waited = max(0, now[0] - self._ran), max(0, now[1] - self._waited)
        return waited / (ran + waited) if ran + waited >= _LEAST else None


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_line(share: float | None) -> str | None:
    """A sentence for the user of a busy machine; None for a quiet or unknown one."""
    if share is None or share < BUSY:
        return None
    return (
        f"the machine is busy: for {share:.0%} of its time the training waited for a core that other programs used; expect "
        "more tokens/s and, with a time limit, more steps and a lower loss when nothing else runs"
    )


def _times(pid: int | str) -> tuple[int, int] | None:
    """The nanoseconds that the threads of a process ran and waited."""
    ran = waited = 0
    try:
        for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                numbers = file.read_text().split()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
            ran, waited = ran + int(numbers[0]), waited + int(numbers[1])
    except (OSError, ValueError, IndexError):
        return None
    return (ran, waited) if ran else None
