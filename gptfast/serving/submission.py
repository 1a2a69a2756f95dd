"""What the worker has been asked to do, and the way of its results back to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from typing import Any

from gptfast.generation import Request, Token

Event = Token | Request | Exception  # a new token, a request that has ended, or an error

log = logging.getLogger("gptfast.serve")


class Submission:
    """Requests that were submitted together; their events arrive on the event loop that made it.

    Args:
        requests: the requests.
        streams: whether their tokens are needed as they are generated, or only at their end.
    """

    def __init__(self, requests: list[Request], streams: bool) -> None:
        self.requests = requests
        self._streams = streams
        self._loop = asyncio.get_running_loop()
        self._arrived: deque[Event] = deque()
        self._wake, self._ready, self._waits = asyncio.Event(), False, False

    def send(self, events: Sequence[Event]) -> None:
        """Thread-safe: deliver events. The loop is woken only if it waits for them, as that takes CPU time from generation."""
        self._arrived += events
        if not self._streams and all(isinstance(event, Token) for event in events):
            return
        self._ready = True
        if not self._waits:
            return
        self._waits = False
        try:
            self._loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop is closed
            log.debug("a request outlived its event loop")

    async def events(self, seconds: float, pause: Callable[[], float] = lambda: 0.0) -> AsyncIterator[list[Event]]:
        """Yields the events that have arrived, until all requests have ended.

        Args:
            seconds: time limit for all of it.
            pause: returns the seconds to wait after each list; events that arrive meanwhile are in the next.
        Raises:
            TimeoutError: the time limit.  Exception: an error that was delivered.
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
            self._waits = True  # before the test: what arrives after the test sets `_wake`
            if self._ready:
                break
            await self._wake.wait()
            self._wake.clear()
        self._waits = self._ready = False


class BackgroundTask:
    """A cooperative task that the worker advances between decode steps; its result arrives on the event loop."""

    def __init__(self, pieces: Generator[None, None, Any]) -> None:
        self._pieces = pieces
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[Any] = self._loop.create_future()

    def advance(self) -> bool:
        """Run the next piece, on the worker's thread; returns whether it was the last."""
        try:
            next(self._pieces)
            return False
        except StopIteration as end:
            self.end(end.value)
        except Exception as error:
            self.end(error=error)
        return True

    def end(self, value: Any = None, error: Exception | None = None) -> None:
        """Deliver the result, or an error."""

        def deliver() -> None:
            if not self.result.done():
                self.result.set_exception(error) if error else self.result.set_result(value)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(deliver)
