"""Limits of connections: their number, and the time in which a client must send its request."""

from __future__ import annotations

import asyncio
import http
import json
import logging
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from gptfast.serving.protocol import ApiError

try:
    import resource
except ImportError:  # Windows, where sockets are no files
    resource = None

log = logging.getLogger("uvicorn.error")  # the log of uvicorn

USUAL_CONNECTIONS = 1024  # smallest default, if a process may open that many files
OWN_FILES = 64  # files of this process other than connections
LINGER = 1.0  # seconds in which a rejected client can read the answer
# Clients close what they have not used for a while: httpx after 5 seconds, aiohttp after 15, Go after 90, curl after 118. A
# server that is first closes a connection on which the next request may be under way, and that request is lost.
IDLE_SECONDS = 180.0
SENDING, IDLE = "sending", "idle"  # what a client does that waits for no answer
LOG_EVERY = 10.0  # seconds between warnings


def most_connections() -> int:
    """The largest number of connections within the limit of open files (`ulimit -n`)."""
    if resource is None:
        return USUAL_CONNECTIONS
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        files = 1 << 20
    return max(1, (files - OWN_FILES) * 4 // 5)  # a fifth for connections that are accepted or closed at the moment


def choose_connections(wanted: int | None, texts: int) -> int:
    """The largest number of connections of a server.

    Args:
        wanted: the requested number; None: 1024 or four per text, within the limit of open files.
        texts: texts that the server generates and queues.
    Raises:
        ValueError: `wanted` is below 1 or above the limit.
    """
    most = most_connections()
    if wanted is None:
        return min(max(USUAL_CONNECTIONS, 4 * texts), most)
    if not 1 <= wanted <= most:
        raise ValueError(
            f"serve: `max_connections` is {wanted}; expected 1 to {most}, the limit of open files - give "
            "fewer, or raise `ulimit -n`"
        )
    return wanted


class Connections:
    """All connections of one server.

    A connection waits for its client until a whole request has arrived, and then for the model until the answer is sent.
    At the limit a new client displaces the connection that has waited longest for its client. If all connections wait for
    the model, the new client is rejected. Clients that send incomplete requests therefore block nobody.

    Args:
        most: largest number of connections.
        client_seconds: time for a client to send its request, head and body; then it is rejected with 408. It does not run
            between two requests of a connection.
        answer_seconds: time until the client has received the whole answer; then the connection is aborted.
    """

    def __init__(self, most: int, client_seconds: float, answer_seconds: float) -> None:
        self.most, self._client_seconds, self._answer_seconds = most, client_seconds, answer_seconds
        self._most_leaving = max(1, most // 8)
        self.burst = max(1, most // 32)  # connections accepted in one go; up to four such groups are not registered yet
        self._waiting: dict[Connection, asyncio.TimerHandle] = {}  # for their clients, longest first
        self._answered: dict[Connection, asyncio.TimerHandle] = {}
        self._leaving: dict[Connection, asyncio.TimerHandle] = {}
        self._sent_away, self._logged = 0, -LOG_EVERY

    def __len__(self) -> int:
        return len(self._waiting) + len(self._answered)

    def __call__(self, **options: Any) -> Connection:
        """The protocol of a new connection, for uvicorn."""
        return Connection(self, **options)

    def enter(self, new: Connection) -> None:
        """Admit or reject a client that has connected."""
        if len(self) >= self.most:
            self._log()
            longest = next(iter(self._waiting), None)
            if longest is None:
                return new.send_away(503, f"all {self.most} connections wait for texts", "busy")
            longest.send_away(
                503, f"{self.most} connections, the limit, and this one has sent no whole request", "busy"
            )
        self.wait_for_client(new)

    def wait_for_client(self, connection: Connection, seconds: float | None = None) -> None:
        """seconds: that it may take; None: the time for a request."""
        self.forget(connection)
        self._waiting[connection] = self._later(seconds or self._client_seconds, connection.time_out)

    def wait_for_model(self, connection: Connection) -> None:
        self.forget(connection)
        self._answered[connection] = self._later(self._answer_seconds, connection.transport.abort)

    def linger(self, connection: Connection) -> None:
        """Keep a rejected connection open for a moment, outside the limit, so that its client can read the answer."""
        self.forget(connection)
        if len(self._leaving) < self._most_leaving:
            self._leaving[connection] = self._later(LINGER, connection.transport.abort)
        else:
            connection.transport.abort()

    def forget(self, connection: Connection) -> None:
        for group in (self._waiting, self._answered, self._leaving):
            if timer := group.pop(connection, None):
                timer.cancel()

    def _later(self, seconds: float, call: Any) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, call)

    def _log(self) -> None:
        self._sent_away += 1
        now = asyncio.get_running_loop().time()
        if now - self._logged >= LOG_EVERY:
            log.warning("%d clients rejected: there are %d connections, the limit", self._sent_away, self.most)
            self._sent_away, self._logged = 0, now


class Connection(H11Protocol):
    """A connection that reports its state to `connections`."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._all, self._gone = connections, False
        self._state: object = SENDING  # that, IDLE, or the request whose answer the client waits for

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._all.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._gone:
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._state = None  # differs from every other, so that the time of the next request is its own
        self._look()

    def shutdown(self) -> None:
        if self._is_open and self.cycle.more_body and not self._gone:
            self.send_away(503, "the server is shutting down", "shutting_down")
        elif not self._gone:
            super().shutdown()

    def _look(self) -> None:
        """Register whether the connection waits for its client or for the model."""
        if self._gone or self.transport.is_closing():
            return
        state: object = SENDING if self._has_begun else IDLE
        if self._is_open and not self.cycle.more_body:
            state = self.cycle
        if state is self._state:
            return
        self._state = state
        if state is SENDING:
            self._all.wait_for_client(self)
        elif state is IDLE:
            self._all.wait_for_client(self, IDLE_SECONDS)
        else:
            self._all.wait_for_model(self)

    @property
    def _has_begun(self) -> bool:
        """Whether the client waits for something: its connection is new, or a part of a request has arrived."""
        return self._is_open or bool(self.conn.trailing_data[0]) or self.cycle is None

    @property
    def _is_open(self) -> bool:
        """Whether a request has begun and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def time_out(self) -> None:
        self.send_away(408, "the request did not arrive in time; send it without pauses", "timeout")

    def send_400_response(self, msg: str) -> None:
        self.send_away(400, msg, "invalid_http")

    def send_away(self, status: int, message: str, code: str) -> None:
        """End the connection, with an answer if the client waits for one."""
        begun, self._gone = self._has_begun, True
        if self.transport.is_closing() or (self._is_open and self.cycle.response_started):
            return self.transport.abort()  # the client would read an error as a part of the answer
        if not begun:
            self.transport.close()
            return self._all.linger(self)
        if self._is_open:  # wakes the code that still reads the body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = json.dumps(ApiError(status, message, code=code).body()).encode()
        head = [
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(["retry-after: 5"] if status == 503 else []),
            "connection: close",
        ]
        self.transport.write("\r\n".join([*head, "", ""]).encode() + body)
        self.transport.write_eof()  # not closed yet: unread data would turn the answer into a reset
        self.transport.resume_reading()
        self._all.linger(self)
