"""Running the application on a socket, with a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import uvicorn
from fastapi import FastAPI

from gptfast.serving.connections import IDLE_SECONDS, Connections, choose_connections

log = logging.getLogger("uvicorn.error")  # the log of uvicorn

GRACE = 5.0  # seconds for running requests after SIGTERM or SIGINT
MOST_UNACCEPTED = 2048  # connections in the queue of the system


def bind(host: str, port: int) -> socket.socket:
    """A socket for `run`, bound before the model is loaded so that an address in use is noticed at once.

    Raises:
        OSError: the address is in use, or does not belong to this machine.
    """
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # so that no other server takes it while the model loads
    except OSError as error:
        raise OSError(
            f"serve: cannot listen on {host}, port {port}: {error.strerror or error}; choose another `port`, or a `host` of "
            "this machine"
        ) from None
    return bound


class GracefulServer(uvicorn.Server):
    """A server with a graceful shutdown: it rejects new requests, and cancels running ones after `grace` seconds.

    Args:
        app: the application of `create_app`; its limits also apply to the connections.
        bound: the socket of `bind`.
        log_level: log level of uvicorn.
        grace: seconds for running requests to finish.
    """

    def __init__(self, app: FastAPI, bound: socket.socket, log_level: str = "info", grace: float = GRACE) -> None:
        limits = app.state.limits
        most = choose_connections(limits.max_connections, limits.max_rows + limits.max_queue)
        answer_seconds = limits.seconds + limits.client_seconds  # the first for the answer, the second for sending it
        self.connections = Connections(most, limits.client_seconds, answer_seconds)
        host, port = bound.getsockname()[:2]
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=self.connections,  # pyright: ignore[reportArgumentType] (callable like a class of protocols)
            ws="none",
            log_level=log_level,
            backlog=self.connections.burst,
            timeout_keep_alive=int(IDLE_SECONDS),
            timeout_graceful_shutdown=int(grace) + 5,
        )
        super().__init__(config)
        self._bound, self._grace = bound, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._bound.listen(
            MOST_UNACCEPTED
        )  # asyncio also uses `backlog` as the number of connections to accept at once
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        log.info("gptfast serve is running on http://%s:%d (Ctrl-C ends it)", host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        asyncio.get_running_loop().call_later(self._grace, app.state.worker.stop)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then shut down gracefully."""
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        GracefulServer(app, bound).run([bound])
