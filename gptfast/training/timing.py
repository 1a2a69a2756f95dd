"""Where the time of a run goes: how fast its steps are, how long it has run, how many more steps fit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_SETTLE_STEPS = 3  # not measured: memory is touched for the first time, buffers are made
_PLAN_STEPS, _PLAN_SECONDS = 50, 2.0  # to measure before the first plan, whichever comes first
_RECENT = 20  # steps that the speed is the mean of
_RESERVE = 1.5  # for the last evaluation and checkpoint, as a multiple of the longest so far
_LEAST_RESERVE = 0.01  # of the limit, on top of that


class RunClock:
    """Counts from its construction.

    Args:
        before: seconds of earlier sessions of the run.
        limit: seconds that all sessions may take, or None.
        evaluation: how many steps' time an evaluation is expected to take; used until one has been measured.
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
        """Mean of the last 20 steps, without what came between them; None before there are settled ones."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step."""
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
        """Around evaluations and checkpoints."""
        start = time.perf_counter()
        yield
        self._longest_pause = max(self._longest_pause, time.perf_counter() - start)

    @property
    def out_of_time(self) -> bool:
        """True where another step would leave too little for the last evaluation and checkpoint."""
        left = self._seconds_left()
        return left is not None and left <= (self.step_seconds or 0.0)

    @property
    def can_plan(self) -> bool:
        """True where there is a limit, and the speed is known well enough to plan with it."""
        measured = time.perf_counter() - self._settled
        settled = self._steps > _SETTLE_STEPS
        enough = self._steps - _SETTLE_STEPS >= _PLAN_STEPS or measured >= _PLAN_SECONDS
        return self._limit is not None and settled and enough

    def more_steps(self) -> int:
        """How many more steps fit into the limit at the pace so far, evaluations and checkpoints included."""
        return max(0, int((self._seconds_left() or 0.0) / self.seconds_per_step()))

    def seconds_per_step(self) -> float:
        """Of this session, with evaluations and checkpoints; once settled."""
        return (time.perf_counter() - self._settled) / max(1, self._steps - _SETTLE_STEPS)

    def _seconds_left(self) -> float | None:
        if self._limit is None:
            return None
        expected = self._evaluation * (self.step_seconds or 0.0)
        reserve = _RESERVE * max(self._longest_pause, expected) + _LEAST_RESERVE * self._limit
        return self._limit - self.seconds - reserve
