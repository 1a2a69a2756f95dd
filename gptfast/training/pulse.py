"""Signs of life of the processes of a run, for what may take long, such as a checkpoint: no collective tells there who is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

_BEATS = 8  # signs of life in the time after which a process counts as lost
_LEAST = 20.0  # seconds


class Pulse:
    """A thread that says that this process lives, and a look at what the rank before it says.

    A process that computes, reads or writes goes on saying it; one that is stopped, or whose machine is gone, does not. Each
    looks at one other, so that a thousand do not ask for a thousand.

    Args:
        store: of the attempt.
        rank, size: which process this is, of how many.
        timeout: seconds of silence after which a process counts as lost; at least 20, as a busy machine delays a thread.

    before: the rank that is listened to. patience: seconds of its silence.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float) -> None:
        self._store, self._own, self.before = store, f"pulse/{rank}", (rank - 1) % size
        self.patience = max(timeout, _LEAST)
        self._heard, self._since, self._end = b"", 0.0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        self._thread.join(1.0)  # not while the store does not answer

    def _beat(self) -> None:
        count = 0
        try:
            while not self._end.wait(self.patience / _BEATS):
                count += 1
                self._store.set(self._own, str(count))
        except RuntimeError:  # the store is gone, which those who wait for it tell
            return

    def listen(self) -> None:
        """Begin to listen: silence counts from now on."""
        self._since = time.monotonic()

    def is_silent(self) -> bool:
        """Whether the rank before this one has said nothing new for `patience` seconds since `listen`; call it often.

        Raises:
            RuntimeError: the store is gone.
        """
        key, now = f"pulse/{self.before}", time.monotonic()
        heard = self._store.get(key) if self._store.check([key]) else b""
        if heard != self._heard:
            self._heard, self._since = heard, now
        return now - self._since > self.patience
