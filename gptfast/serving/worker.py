"""The thread that runs the model. Requests reach it from the event loop, and tokens come back to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any, TypeVar

from gptfast.generation import Request, Scheduler, Token

T = TypeVar("T")

MOST_TOGETHER = 4  # tokens of a row in a step: more gains nothing

log = logging.getLogger("gptfast.serve")


class QueueFull(Exception):
    """As many requests run and wait as there may be."""


class ShuttingDown(Exception):
    """The server was told to stop, and gives up what it has not finished."""


Event = Token | Request | Exception  # a new token, a request that has ended, or what went wrong


class Ticket:
    """Requests on their way; what becomes of them arrives on the event loop that they came from.

    Args:
        requests: that were asked for together.
        streams: whether their tokens are wanted as they come; else with their end.
    """

    def __init__(self, requests: list[Request], streams: bool) -> None:
        self.requests = requests
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Event] = deque()
        self._wake, self._ready, self._waits = asyncio.Event(), False, False

    def send(self, events: Sequence[Event]) -> None:
        """From any thread. The loop is woken only if it waits for them: that takes time from the cores that write."""
        self._arrived += events
        if not self._streams and all(isinstance(event, Token) for event in events):
            return
        self._ready = True
        if not self._waits:
            return
        self._waits = False
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("a request outlived its event loop")

    async def events(self, seconds: float, pause: Callable[[], float] = lambda: 0.0) -> AsyncIterator[list[Event]]:
        """Tokens, and requests that have ended, until all have: at a time all that have arrived.

        Args:
            seconds: for all of it.
            pause: seconds between two answers, asked for after each; what comes meanwhile comes together.
        Raises:
            TimeoutError: they did not in `seconds`.  Exception: what went wrong.
        """
        loop, left = asyncio.get_running_loop(), len(self.requests)
        timeout = loop.call_later(seconds, self.send, [TimeoutError()])
        try:
            while left:
                await self._wait_until_ready()
                events = [self._arrived.popleft() for _ in range(len(self._arrived))]
                for event in events:
                    if isinstance(event, Exception):
                        raise event
                left -= sum(isinstance(event, Request) for event in events)
                yield events
                if left:
                    await asyncio.sleep(pause())
        finally:
            timeout.cancel()

    async def _wait_until_ready(self) -> None:
        while True:
            self._waits = True  # before the look: what comes after it sets `_wake`
            if self._ready:
                break
            await self._wake.wait()
            self._wake.clear()
        self._waits = self._ready = False


class Errand:
    """Work beside the writing, done piece by piece between two steps; its result arrives on the event loop."""

    def __init__(self, pieces: Generator[None, None, Any]) -> None:
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()

    def advance(self) -> bool:
        """From the worker's thread, one piece further; whether that was the last."""
        try:
            next(self._pieces)
            return False
        except StopIteration as end:
            self.end(end.value)
        except Exception as error:
            self.end(error=error)
        return True

    def end(self, value: Any = None, error: Exception | None = None) -> None:
        def tell() -> None:
            if not self.result.done():
                self.result.set_exception(error) if error else self.result.set_result(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(tell)


class Worker:
    """Steps a scheduler in a thread of its own while there is work.

    Args:
        make_scheduler: makes the scheduler, and a new one after a step has failed.
        max_queue: how many sequences and errands may wait beside the scheduler's max_rows.
        max_events: parts of streams that are sent a second, all streams together.
    """

    def __init__(self, make_scheduler: Callable[[], Scheduler], max_queue: int, max_events: float) -> None:
        self._make, self._max_events = make_scheduler, max_events
        self.scheduler = make_scheduler()
        self.max_open = self.scheduler.max_rows + max_queue
        self._tickets: dict[Request, Ticket] = {}
        self._errands: list[Errand] = []
        self._commands: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._closed, self._together = False, 1
        self._thread = threading.Thread(target=self._run, name="gptfast-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up what runs and waits, which is told `ShuttingDown`, and end the thread; from any thread."""
        with self._changed:
            self._closed = True
            self._wake()

    def close(self) -> None:
        """As `stop`, and return when the thread has ended."""
        self.stop()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_sequences(self) -> int:
        """How many return sequences, and errands, run or wait."""
        with self._changed:
            return self._open()

    def pause(self) -> float:
        """Seconds between two parts of a stream."""
        return self.open_sequences / self._max_events

    def _open(self) -> int:
        return sum(request.config.num_return_sequences for request in self._tickets) + len(self._errands)

    def _check_room(self, wanted: int) -> None:
        if self._closed:
            raise ShuttingDown
        if not self.alive:
            raise RuntimeError("the worker has ended; restart the server")
        if self._open() + wanted > self.max_open:
            raise QueueFull

    def submit(self, requests: list[Request], streams: bool = True) -> Ticket:
        """Queue requests, all or none, from the event loop.

        Args:
            requests, streams: see `Ticket`.
        Raises:
            TypeError, ValueError: as `Scheduler.submit`.  QueueFull: there is no room in the queue.  ShuttingDown.
        """
        for request in requests:
            self.scheduler.check(request)
        ticket = Ticket(requests, streams)
        with self._changed:
            self._check_room(sum(request.config.num_return_sequences for request in requests))
            self._tickets |= dict.fromkeys(requests, ticket)

        def submit() -> None:
            for request in requests:
                if request in self._tickets:  # else it was given up meanwhile
                    self.scheduler.submit_request(request)

        self._do(submit)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of these requests; their rows are free before the next step."""

        def cancel() -> None:
            for request in ticket.requests:
                if request in self._tickets:  # else it ended meanwhile
                    self.scheduler.cancel(request)
                    self._finish(request, request)

        self._do(cancel)

    async def run(self, pieces: Generator[None, None, T]) -> T:
        """What `pieces` returns; the worker advances it by one piece between two steps, so that texts are not kept waiting.

        Raises:
            QueueFull: there is no room in the queue.  ShuttingDown.  Exception: what `pieces` raises.
        """
        errand = Errand(pieces)
        with self._changed:
            self._check_room(1)
            self._errands.append(errand)
            self._wake()
        try:
            return await errand.result
        finally:
            self._drop(errand)

    def _drop(self, errand: Errand) -> None:
        with self._changed:
            if errand in self._errands:
                self._errands.remove(errand)

    def _do(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._wake()

    def _wake(self) -> None:
        self._changed.notify()
        self.scheduler.hurry()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._errands or self._closed or self._writes()):
                    self._changed.wait()
                commands, self._commands = self._commands, []
                errand = self._errands[0] if self._errands else None
                if self._closed:
                    break
            try:
                for command in commands:
                    command()
                if errand is not None and errand.advance():
                    self._drop(errand)
                self._deliver(self._step())
            except Exception as error:
                log.exception("a step failed; the requests that ran are given up")
                self._give_up(error)
        self._give_up(ShuttingDown())
        for errand in list(self._errands):
            errand.end(error=ShuttingDown())

    def _step(self) -> list[Token]:
        """As many tokens of each row as streams send together anyway, as far as that is known from the step before."""
        begin, made = time.perf_counter(), self.scheduler.step(self._together)
        rows = len({(token.request, token.stream) for token in made})
        if made:
            a_token = (time.perf_counter() - begin) * rows / len(made)
            self._together = max(1, min(MOST_TOGETHER, int(self.pause() / a_token)))
        return made

    def _writes(self) -> bool:
        return bool(self.scheduler.waiting or self.scheduler.running)

    def _deliver(self, tokens: list[Token]) -> None:
        by_ticket: dict[Ticket, list[Token]] = {}
        for token in tokens:
            if token.request in self._tickets:
                by_ticket.setdefault(self._tickets[token.request], []).append(token)
        for ticket, new in by_ticket.items():
            ticket.send(new)
        for request in [request for request in list(self._tickets) if request.done]:
            self._finish(request, request.error or request)

    def _finish(self, request: Request, what: Request | Exception) -> None:
        with self._changed:
            ticket = self._tickets.pop(request)
        ticket.send([what])

    def _give_up(self, error: Exception) -> None:
        """Every request gets the error; the scheduler, whose state nobody knows now, is replaced."""
        for request in list(self._tickets):
            self._finish(request, error)
        if not self._closed:
            self.scheduler = self._make()
