"""What pages of other sites must not do with a server: ask it under a name of theirs (DNS rebinding), or send it work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from gptfast.serving.cors import is_allowed
from gptfast.serving.hosts import is_name_of, without_port
from gptfast.serving.protocol import ApiError

ADD_HOST = "if it is one of its own, start it with --allowed-host {name}"
_READ = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI middleware that refuses with 403 what a browser sends for a page of another site.

    A name that the server does not have, in the header Host, is that of a page whose site lets its own name lead here; for the
    browser the two are one site, and the page could read the answers. A page under its own name cannot read them, yet its POST
    would be carried out; Sec-Fetch-Site or Origin say where it comes from. Programs other than browsers send neither.

    Args:
        hosts: names of the server, as `gptfast.serving.hosts.hosts_of` returns them.
        origins: of pages elsewhere that may ask, as in `gptfast.serving.cors.allow_origins`.
        advice: what a client under another name is told to do; "{name}" is that name.
    """

    def __init__(self, app: Any, hosts: Sequence[str], origins: Sequence[str] = (), advice: str = ADD_HOST) -> None:
        self._app, self._hosts, self._origins, self._advice = app, hosts, origins, advice

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            return await self._app(scope, receive, send)
        await JSONResponse(error.body(), error.status)(scope, receive, send)

    def _error(self, scope: dict[str, Any]) -> ApiError | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host")
        if host is not None and not is_name_of(self._hosts, host):
            advice = self._advice.format(name=without_port(host) or "NAME")
            message = f"this server does not answer to the name {host!r}; {advice}"
            return ApiError(403, message, code="host_not_allowed")
        if scope["method"] not in _READ and self._is_elsewhere(headers):
            origin = headers.get(b"origin", "null")
            allow = f"--cors-origin {'*' if origin == 'null' else origin}"
            message = f"a page of {origin!r} may not use this server; start it with {allow} to allow that"
            return ApiError(403, message, code="origin_not_allowed")
        return None

    def _is_elsewhere(self, headers: dict[bytes, str]) -> bool:
        """Whether a page that is neither this server's nor an allowed one has sent the request."""
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if site in ("same-origin", "none"):
            return False
        if origin is None:
            return site is not None
        if is_allowed(origin, self._origins):
            return False
        return site is not None or origin.partition("://")[2] != headers.get(b"host")
