"""The thread that runs the model. Requests reach it from the event loop, and tokens come back to it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from gptfast.generation import Request, Scheduler, Token

T = TypeVar("T")

log = logging.getLogger("gptfast.serve")


class QueueFull(Exception):
    """As many requests run and wait as there may be."""


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


class Worker:
    """Steps a scheduler in a thread of its own while there is work.

    Args:
        make_scheduler: makes the scheduler, and a new one after a step has failed.
        max_queue: how many sequences may wait beside the scheduler's max_rows.
    """

    def __init__(self, make_scheduler: Callable[[], Scheduler], max_queue: int) -> None:
        self._make = make_scheduler
        self.scheduler = make_scheduler()
        self._max_open = self.scheduler.max_rows + max_queue
        self._tickets: dict[Request, Ticket] = {}
        self._commands: list[Callable[[], object]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="gptfast-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End every request and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def open_sequences(self) -> int:
        """How many return sequences run or wait."""
        with self._changed:
            return sum(request.config.num_return_sequences for request in self._tickets)

    def submit(self, requests: list[Request], streams: bool = True) -> Ticket:
        """Queue requests, all or none, from the event loop.

        Args:
            requests, streams: see `Ticket`.
        Raises:
            TypeError, ValueError: as `Scheduler.submit`.  QueueFull: there is no room in the queue.
        """
        if not self.alive:
            raise RuntimeError("the worker has ended; restart the server")
        for request in requests:
            self.scheduler.check(request)
        ticket = Ticket(requests, streams)
        with self._changed:
            wanted = sum(request.config.num_return_sequences for request in (*self._tickets, *requests))
            if wanted > self._max_open:
                raise QueueFull
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

    async def call(self, function: Callable[[], T]) -> T:
        """What `function()` returns when the worker runs it, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def set_result(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_exception(error) if error else future.set_result(result)

        def run() -> None:
            try:
                result, error = function(), None
            except Exception as caught:
                result, error = None, caught
            loop.call_soon_threadsafe(set_result, result, error)

        self._do(run)
        return await future

    def _do(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._closed or self.scheduler.waiting or self.scheduler.running):
                    self._changed.wait()
                commands, self._commands = self._commands, []
                if self._closed:
                    break
            try:
                for command in commands:
                    command()
                self._deliver(self.scheduler.step())
            except Exception as error:
                log.exception("a step failed; the requests that ran are given up")
                self._give_up(error)
        self._give_up(RuntimeError("the server is shutting down"))

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
