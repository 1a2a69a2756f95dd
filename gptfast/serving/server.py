"""Runs the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import uvicorn
from fastapi import FastAPI

from gptfast.serving.connections import Connections, choose_connections

log = logging.getLogger("uvicorn.error")  # where the rest is told

GRACE = 5.0  # seconds that requests may go on after SIGTERM or SIGINT
MOST_UNACCEPTED = 2048  # connections that the system keeps until they are accepted


def bind(host: str, port: int) -> socket.socket:
    """A socket for `run`, bound before a model is loaded in vain.

    Raises:
        OSError: the address is in use, or none of this machine's.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # so that no other server takes it meanwhile
    except OSError as error:
        raise OSError(
            f"serve: cannot listen at {host}, port {port}: {error.strerror or error}; choose another --port, or a --host of "
            "this machine"
        ) from None
    return bound


class GracefulServer(uvicorn.Server):
    """Told to stop, it takes no more requests; those that run may end within `grace` seconds, and then are told.

    Args:
        app: of `create_app`, whose limits hold for the connections too.
        bound: of `bind`.
        log_level: of uvicorn.
        grace: see above.
    """

    def __init__(self, app: FastAPI, bound: socket.socket, log_level: str = "info", grace: float = GRACE) -> None:
        limits = app.state.limits
        most = choose_connections(limits.max_connections, limits.max_rows + limits.max_queue)
        answer_seconds = limits.seconds + limits.client_seconds  # it is there within the first
        self.connections = Connections(most, limits.client_seconds, answer_seconds)
        host, port = bound.getsockname()[:2]
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=self.connections,  # pyright: ignore[reportArgumentType] (it makes protocols, as a class of them does)
            ws="none",
            log_level=log_level,
            backlog=self.connections.burst,
            timeout_graceful_shutdown=int(grace) + 5,
        )
        super().__init__(config)
        self._bound, self._grace = bound, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._bound.listen(MOST_UNACCEPTED)  # asyncio takes `backlog` for how many it accepts at once, too
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        log.info("gptfast serve is running on http://%s:%d (Ctrl-C ends it)", host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        asyncio.get_running_loop().call_later(self._grace, app.state.worker.stop)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then as `GracefulServer`."""
    with contextlib.suppress(KeyboardInterrupt):  # raised anew when all has ended
        GracefulServer(app, bound).run([bound])
