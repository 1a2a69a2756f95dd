"""What the processes of a run tell each other through the store that they share: short texts, and that one has failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from gptfast.training.pulse import Pulse

GONE = "the store is gone with the process that kept it"


class RankLostError(RuntimeError):
    """A rank does not answer: it died, hangs, or failed by itself."""


class StoreLostError(RuntimeError):
    """The process that keeps the store does not answer, or is gone; the text says which it is."""


class AnsweringStore:
    """A store of torch.distributed whose calls end: torch waits for ever for a process that keeps it and is stopped.

    Args:
        store: whose `check`, `get`, `set` and `compare_set` are called, each in a thread.
        keeper: the process that keeps it, such as "rank 0".
        seconds: after which a call counts as not answered.
    """

    def __init__(self, store: Any, keeper: str, seconds: float) -> None:
        self._store, self._keeper, self._seconds, self._lost = store, keeper, seconds, False

    def __getattr__(self, name: str) -> Any:
        """A method of the store. It raises StoreLostError where the store is gone or does not answer, and at once where it once
        did not."""
        method = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            found: list[Any] = []
            errors: list[RuntimeError] = []

            def ask() -> None:
                try:
                    found.append(method(*arguments))
                except RuntimeError as error:
                    errors.append(error)

            if not self._lost:
                thread = threading.Thread(target=ask, daemon=True)
                thread.start()
                thread.join(self._seconds)
                self._lost = thread.is_alive()
            if self._lost:
                raise StoreLostError(f"{self._keeper}, which keeps the store, did not answer")
            if errors:
                raise StoreLostError(f"{self._keeper}, which kept the store, left") from errors[0]
            return found[0]

        return call


class Messages:
    """The part of `Ranks` that uses the store; its attributes are set there.

    step: for messages. pulse: by which a lost rank is noticed while what may take long is waited for; None: it is not.
    """

    rank: int
    size: int
    step: int
    timeout: float
    pulse: Pulse | None
    _store: Any
    _run_store: Any
    _here: str

    @property
    def has_begun(self) -> bool:
        """Whether an earlier attempt began the run, so that what its folder holds is of this run."""
        return self._reach(lambda: self._run_store.check(["begun"]), "the start")

    def begin(self) -> None:
        self._reach(lambda: self._run_store.set("begun", ""), "the start")

    def begin_pulse(self) -> None:
        """Say from now on that this process lives, until `end_pulse`."""
        if self.size > 1:
            self.pulse = Pulse(self._store, self.rank, self.size, self.timeout)
            self.pulse.begin()

    def end_pulse(self) -> None:
        if self.pulse is not None:
            self.pulse.end()

    def tell(self, key: str, text: str) -> None:
        """Let the others know something under a key that is used once.

        Raises:
            RankLostError: the process that kept the store is gone.
        """
        self._reach(lambda: self._store.set(key, text), "a message")

    def ask(self, key: str, what: str) -> str:
        """What a rank has told under this key.

        Raises:
            RankLostError: the process that kept the store is gone.
        """
        return self._reach(lambda: self._store.get(key).decode(), what)

    def _check_main(self) -> None:
        if self._store.check(["error"]) and self._store.get("error").decode() != str(self.rank):
            raise RankLostError(f"{self._here}: a rank failed; its own message says why")

    def _listen(self, what: str) -> None:
        if self.pulse is not None and self.pulse.is_silent():
            raise RankLostError(
                f"{self._here}: rank {self.pulse.before} gave no sign of life for {self.pulse.patience:g} s {self._during(what)}: it is "
                "stopped, or its machine is gone"
            )

    def _reach(self, act: Callable[[], Any], what: str) -> Any:
        """What `act` returns, which uses the store; torch's errors become ours."""
        try:
            return act()
        except RankLostError:
            raise
        except RuntimeError as error:
            text = str(error) if isinstance(error, StoreLostError) else f"{GONE},"
            raise RankLostError(f"{self._here}: {text} {self._during(what)}") from error

    def claims(self) -> bool:
        """Whether this rank is the first that failed, which is the one to print why."""
        try:
            mine = str(self.rank)
            first = self._store.compare_set("error", "", mine).decode() == mine
            self._store.set(f"seen/{self.rank}", "")
            return first
        except RuntimeError:  # the store is gone with the process that kept it
            return True

    def await_seen(self, seconds: float) -> None:
        """Give the others time to see that a rank has failed: the process that keeps the store must outlive their look."""
        end = time.monotonic() + seconds
        others = [f"seen/{rank}" for rank in range(self.size) if rank != self.rank]
        try:
            while time.monotonic() < end and not self._store.check(others):
                time.sleep(0.02)
        except RuntimeError:  # another process kept it, and has left
            return

    def _during(self, what: str) -> str:
        return f"during {what} of step {self.step}" if self.step else f"during {what}"
