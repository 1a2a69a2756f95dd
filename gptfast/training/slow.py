"""Detection of slow ranks: a hot or shared machine delays all others, and only its own computing time shows it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

RATIO = 1.5  # a rank that computes for more than this multiple of the median is slow
STEPS = 5  # consecutive slow steps before a rank is reported
AGAIN = 200  # further ones before it is reported again


class SlowRanks:
    """Watches the time that each rank computes in a step, without the time that it waits for others."""

    def __init__(self) -> None:
        self._rank, self._steps = -1, 0

    def look(self, seconds: Sequence[float]) -> dict[str, float]:
        """Record a step; returns {"slow_rank": rank, "times_median": ratio} when a rank is to be reported, else {}.

        Args:
            seconds: computing time of the step, by rank. Of two ranks the shorter time counts as the median.
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
