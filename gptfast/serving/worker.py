"""The thread that runs the model: requests arrive from the event loop, and tokens return to it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator
from typing import TypeVar

from gptfast.generation import Request, Scheduler, Token
from gptfast.serving.submission import BackgroundTask, Submission

T = TypeVar("T")

MAX_TOKENS = 4  # of a sequence in a step: more gains nothing

log = logging.getLogger("gptfast.serve")


class QueueFull(Exception):
    """The maximum number of requests runs and waits."""


class ShuttingDown(Exception):
    """The server has been told to stop, and cancels its requests."""


class Worker:
    """Steps a scheduler on its own thread while there is work.

    Args:
        make_scheduler: called for the scheduler, and for a new one after a failed step.
        max_queue: number of sequences and background tasks that may wait, in addition to the scheduler's max_rows.
        max_events: parts of streams sent per second, over all streams.
    """

    def __init__(self, make_scheduler: Callable[[], Scheduler], max_queue: int, max_events: float) -> None:
        self._make, self._max_events = make_scheduler, max_events
        self.scheduler = make_scheduler()
        self.max_open = self.scheduler.max_rows + max_queue
        self._submissions: dict[Request, Submission] = {}
        self._tasks: list[BackgroundTask] = []
        self._commands: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._closed, self._max_tokens = False, 1
        self._thread = threading.Thread(target=self._run, name="gptfast-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Thread-safe: cancel all requests with `ShuttingDown` and stop the thread."""
        with self._changed:
            self._closed = True
            self._wake()

    def close(self) -> None:
        """Stop, and wait for the end of the thread."""
        self.stop()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_sequences(self) -> int:
        """Number of return sequences and background tasks that run or wait."""
        with self._changed:
            return self._open()

    def pause(self) -> float:
        """Seconds between two parts of a stream, as `max_events` requires."""
        return self.open_sequences / self._max_events

    def _open(self) -> int:
        return sum(request.config.num_return_sequences for request in self._submissions) + len(self._tasks)

    def _check_room(self, wanted: int) -> None:
        if self._closed:
            raise ShuttingDown
        if not self.alive:
            raise RuntimeError("the worker has ended; restart the server")
        if self._open() + wanted > self.max_open:
            raise QueueFull

    def submit(self, requests: list[Request], streams: bool = True) -> Submission:
        """Queue requests, all or none; called on the event loop.

        Args:
            requests, streams: see `Submission`.
        Raises:
            TypeError, ValueError: as `Scheduler.submit`.  QueueFull: there is no room in the queue.  ShuttingDown.
        """
        for request in requests:
            self.scheduler.check(request)
        submission = Submission(requests, streams)
        with self._changed:
            self._check_room(sum(request.config.num_return_sequences for request in requests))
            self._submissions |= dict.fromkeys(requests, submission)

        def submit() -> None:
            for request in requests:
                if request in self._submissions:  # else it has been cancelled
                    self.scheduler.submit_request(request)

        self._do(submit)
        return submission

    def cancel(self, submission: Submission) -> None:
        """Cancel the requests that have not ended; their slots are free before the next step."""

        def cancel() -> None:
            for request in submission.requests:
                if request in self._submissions:  # else it has ended
                    self.scheduler.cancel(request)
                    self._finish(request, request)

        self._do(cancel)

    async def run(self, pieces: Generator[None, None, T]) -> T:
        """Run a generator on the worker's thread, one piece between two steps; returns what it returns.

        Raises:
            QueueFull: there is no room in the queue.  ShuttingDown.  Exception: what `pieces` raises.
        """
        task = BackgroundTask(pieces)
        with self._changed:
            self._check_room(1)
            self._tasks.append(task)
            self._wake()
        try:
            return await task.result
        finally:
            self._drop(task)

    def _drop(self, task: BackgroundTask) -> None:
        with self._changed:
            if task in self._tasks:
                self._tasks.remove(task)

    def _do(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._wake()

    def _wake(self) -> None:
        self._changed.notify()
        self.scheduler.interrupt()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._tasks or self._closed or self._has_requests()):
                    self._changed.wait()
                commands, self._commands = self._commands, []
                task = self._tasks[0] if self._tasks else None
                if self._closed:
                    break
            try:
                for command in commands:
                    command()
                if task is not None and task.advance():
                    self._drop(task)
                self._deliver(self._step())
            except Exception as error:
                log.exception("a step failed; its requests are cancelled")
                self._give_up(error)
        self._give_up(ShuttingDown())
        for task in list(self._tasks):
            task.end(error=ShuttingDown())

    def _step(self) -> list[Token]:
        """One step of the scheduler: of as many tokens as streams send at a time, judging by the previous step."""
        begin, tokens = time.perf_counter(), self.scheduler.step(self._max_tokens)
        sequences = len({(token.request, token.index) for token in tokens})
        if tokens:
            seconds_per_token = (time.perf_counter() - begin) * sequences / len(tokens)
            self._max_tokens = max(1, min(MAX_TOKENS, int(self.pause() / seconds_per_token)))
        return tokens

    def _has_requests(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def _deliver(self, tokens: list[Token]) -> None:
        by_submission: dict[Submission, list[Token]] = {}
        for token in tokens:
            if token.request in self._submissions:
                by_submission.setdefault(self._submissions[token.request], []).append(token)
        for submission, new in by_submission.items():
            submission.send(new)
        for request in [request for request in list(self._submissions) if request.done]:
            self._finish(request, request.error or request)

    def _finish(self, request: Request, event: Request | Exception) -> None:
        with self._changed:
            submission = self._submissions.pop(request)
        submission.send([event])

    def _give_up(self, error: Exception) -> None:
        """Deliver the error to every request, and replace the scheduler, whose state is unknown."""
        for request in list(self._submissions):
            self._finish(request, error)
        if not self._closed:
            self.scheduler = self._make()
