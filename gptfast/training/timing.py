"""The clock of a run: the time of its steps, its total time, and the number of steps that still fit a time limit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_SETTLE_STEPS = 3  # not measured: they touch memory for the first time and allocate buffers
_PLAN_STEPS, _PLAN_SECONDS = 50, 2.0  # measured before the first plan, whichever comes first
_RECENT = 20  # steps over which the speed is averaged
_RESERVE = 1.5  # time for the last evaluation and checkpoint, in multiples of the longest so far
_LEAST_RESERVE = 0.01  # additional reserve, in parts of the limit


class RunClock:
    """Measures a session of a run, from its construction on.

    Args:
        before: seconds of earlier sessions of the run.
        limit: seconds that all sessions together may take; None: no limit.
        evaluation: expected time of an evaluation, in steps; used until an evaluation has been measured.
    """

    def __init__(self, before: float = 0.0, limit: float | None = None, evaluation: float = 0.0) -> None:
        self._before, self._limit, self._evaluation = before, limit, evaluation
        self._start = time.perf_counter()
        self._steps = 0
        self._settled = self._start
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._longest_pause = 0.0

    @property
    def seconds(self) -> float:
        """Wall-clock time of all sessions so far."""
        return self._before + time.perf_counter() - self._start

    @property
    def step_seconds(self) -> float | None:
        """Mean seconds of the last 20 measured steps, without pauses; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A context manager around a step."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._steps += 1
        if self._steps <= _SETTLE_STEPS:
            self._settled = end
        else:
            self._recent.append(end - start)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A context manager around evaluations and checkpoints."""
        start = time.perf_counter()
        yield
        self._longest_pause = max(self._longest_pause, time.perf_counter() - start)

    @property
    def out_of_time(self) -> bool:
        """Whether another step would leave too little time for the last evaluation and checkpoint."""
        left = self._seconds_left()
        return left is not None and left <= (self.step_seconds or 0.0)

    @property
    def can_plan(self) -> bool:
        """Whether there is a limit and the speed is measured well enough to plan with it."""
        measured = time.perf_counter() - self._settled
        settled = self._steps > _SETTLE_STEPS
        enough = self._steps - _SETTLE_STEPS >= _PLAN_STEPS or measured >= _PLAN_SECONDS
        return self._limit is not None and settled and enough

    def more_steps(self) -> int:
        """The number of further steps that fit the limit at the present speed, evaluations and checkpoints included."""
        return max(0, int((self._seconds_left() or 0.0) / self.seconds_per_step()))

    def seconds_per_step(self) -> float:
        """Mean seconds of a step in this session, evaluations and checkpoints included; valid once `can_plan`."""
        return (time.perf_counter() - self._settled) / max(1, self._steps - _SETTLE_STEPS)

    def _seconds_left(self) -> float | None:
        if self._limit is None:
            return None
        expected = self._evaluation * (self.step_seconds or 0.0)
        reserve = _RESERVE * max(self._longest_pause, expected) + _LEAST_RESERVE * self._limit
        return self._limit - self.seconds - reserve
