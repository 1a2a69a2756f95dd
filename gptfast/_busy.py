"""Whether other programs take the cores: how long threads that could run wait for one, as Linux counts it."""

from __future__ import annotations

from pathlib import Path

# Part of the time: on a quiet machine it is a few hundredths; one more thread than cores makes it a third on two.
BUSY = 0.15
_LEAST = 1e9  # nanoseconds of work, before which nothing is said


class CpuWait:
    """Measures from its construction.

    Args:
        pid: of the process, "self" for this one.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._ran, self._waited = _times(pid) or (0, 0)

    def share(self) -> float | None:
        """The time in which threads of the process waited for a core, as a part of that in which they could have run; None
        where too little has been measured, or the system does not say."""
        now = _times(self._pid)
        if now is None:
            return None
        ran, waited = max(0, now[0] - self._ran), max(0, now[1] - self._waited)
        return waited / (ran + waited) if ran + waited >= _LEAST else None


def busy_line(share: float | None) -> str | None:
    """A sentence for the user of a machine that does something else; None where it is quiet, or nothing is known."""
    if share is None or share < BUSY:
        return None
    return (
        f"the machine is busy: for {share:.0%} of its time the training waited for a core that other programs had; expect "
        "more tokens/s and, where the time is limited, more steps and a lower loss when nothing else runs"
    )


def _times(pid: int | str) -> tuple[int, int] | None:
    """Nanoseconds that the threads of a process ran and waited, from the scheduler."""
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
