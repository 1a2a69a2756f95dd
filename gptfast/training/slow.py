"""Ranks that are slower than the others: a hot or shared machine delays all, and only its own times tell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

RATIO = 1.5  # times the median
STEPS = 5  # in a row before it is told, and
AGAIN = 200  # before it is told again


class SlowRanks:
    """Looks at the time that each rank computes in a step, without its waiting."""

    def __init__(self) -> None:
        self._rank, self._steps = -1, 0

    def look(self, seconds: Sequence[float]) -> dict[str, float]:
        """{"slow_rank": …, "times_median": …} when one rank has been slower for some steps, else {}.

        Args:
            seconds: of this step, by rank. The median of two is the shorter one.
        """
        median = statistics.median_low(seconds)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        if not seconds[slowest] > RATIO * median:
            self._rank, self._steps = -1, 0
            return {}
        self._steps = self._steps + 1 if slowest == self._rank else 1
        self._rank = slowest
        if self._steps % AGAIN != STEPS:
            return {}
        return {"slow_rank": slowest, "times_median": round(seconds[slowest] / median, 2)}
