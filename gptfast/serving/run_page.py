"""A training run as a page: what `gptfast watch --serve` shows. It knows nothing of runs but what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response

from gptfast._json import to_text
from gptfast.serving.guard import Guard
from gptfast.serving.hosts import hosts_of
from gptfast.serving.pages import HEADERS, add_page

_NO_ANSWER_IS_KEPT = {**HEADERS, "Cache-Control": "no-store"}
Look = Callable[[], Any]


class _Newest:
    """The newest answer of `look`, as JSON: asked in a thread, one call at a time and at most one in `every` seconds."""

    def __init__(self, look: Look, every: float) -> None:
        self._look, self._every = look, every
        self._lock, self._until, self._answer = asyncio.Lock(), 0.0, b""

    async def __call__(self) -> bytes:
        async with self._lock:
            if time.monotonic() >= self._until:
                found = await asyncio.to_thread(self._look)
                self._answer = to_text(found).encode()
                self._until = time.monotonic() + self._every
            return self._answer


def create_run_app(run: Look, samples: Look, every: float) -> FastAPI:
    """The application: the page at /, and what it asks for. Many browsers cost no more looks than one.

    It answers under the names of this machine alone, so that no page of another site can have its name lead here.

    Args:
        run: what GET /run answers.
        samples: what GET /samples answers; it may take longer, and does not keep /run waiting.
        every: seconds for which an answer is given again.
    """
    app = FastAPI(title="gptfast watch", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts_of("localhost"), advice="open it as http://localhost, with its port")
    add_page(app, ["GET", "HEAD"], "run.html")
    for path, look in (("/run", run), ("/samples", samples)):
        _add(app, path, _Newest(look, every))
    return app


def _add(app: FastAPI, path: str, newest: _Newest) -> None:
    @app.get(path)
    async def answer() -> Any:
        return Response(await newest(), media_type="application/json", headers=_NO_ANSWER_IS_KEPT)


def run_view(app: FastAPI, bound: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT. bound: the socket of `gptfast.serving.server.bind`."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=2)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again after the shutdown
        uvicorn.Server(config).run([bound])
