"""Work for one client, which ends when that client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request as HTTPRequest
from starlette.requests import ClientDisconnect

T = TypeVar("T")


async def while_connected(http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client disconnects.

    Args:
        http: the request of the client; its body has been read.
        work: what it asked for.
    Raises:
        ClientDisconnect: it has left.  Exception: what `work` raises.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(http: HTTPRequest) -> None:
    """Wait until the client has disconnected."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
