"""Runs the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import uvicorn
from fastapi import FastAPI

log = logging.getLogger("uvicorn.error")  # where the rest is told

GRACE = 5.0  # seconds that requests may go on after SIGTERM or SIGINT


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
    """Told to stop, it takes no more requests; those that run may end within `grace` seconds, and then are told."""

    grace = GRACE

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        log.info("gptfast serve is running on http://%s:%d (Ctrl-C ends it)", host, self.config.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        asyncio.get_running_loop().call_later(self.grace, app.state.worker.stop)
        await super().shutdown(sockets)


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, and then as `GracefulServer`."""
    host, port = bound.getsockname()[:2]
    config = uvicorn.Config(app, host=host, port=port, log_level="info", timeout_graceful_shutdown=int(GRACE) + 5)
    with contextlib.suppress(KeyboardInterrupt):  # raised anew when all has ended
        GracefulServer(config).run([bound])
