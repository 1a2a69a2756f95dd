"""What errors become in OpenAI's format, the handlers that answer them, and the limit of request bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gptfast.serving.protocol import ApiError
from gptfast.serving.worker import QueueFull, ShuttingDown

CLIENT_LEFT = 499  # nginx's status for a client that closed the connection before its answer
ROUTES = (
    "POST /v1/completions, POST /v1/chat/completions, GET /v1/models, GET /v1/models/{model}, GET /health, GET /tokenizer_info, POST /tokenize, "
    "POST /detokenize, POST /next_tokens, POST /beam_tree, and the page GET /"
)


@contextmanager
def bad_requests(param: str | None = None) -> Iterator[None]:
    """Turn the errors of a check, ValueError and TypeError, into answers of status 400. param: the field at fault."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error).removeprefix("generate: "), param) from None


@contextmanager
def worker_errors() -> Iterator[None]:
    """Turn what the worker raises, whatever it is, into the error that the client receives, unless it has left."""
    try:
        yield
    except (ApiError, ClientDisconnect):
        raise
    except QueueFull as error:
        message = "too many requests are running and waiting; try again later"
        raise ApiError(429, message, code="queue_full") from error
    except ShuttingDown as error:
        raise ApiError(503, "the server is shutting down", code="shutting_down") from error
    except (TimeoutError, asyncio.TimeoutError) as error:
        message = "the completion was not ready in time; ask for fewer tokens"
        raise ApiError(504, message, code="timeout") from error
    except Exception as error:
        raise ApiError(500, str(error) or type(error).__name__) from error


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the protocol's format."""

    def answer(error: ApiError) -> JSONResponse:
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "5"}}
        return JSONResponse(error.body(), error.status, headers.get(error.status))

    async def on_api_error(_: HTTPRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return answer(error)

    async def on_http_error(http: HTTPRequest, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code not in (404, 405):
            return answer(ApiError(error.status_code, str(error.detail)))
        message = f"{http.method} {http.url.path} does not exist; expected {ROUTES}"
        return answer(ApiError(error.status_code, message, code="unknown_url"))

    async def on_leaving(_: HTTPRequest, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)  # the client has left

    async def on_any(_: HTTPRequest, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "internal server error; see the log of the server"))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ClientDisconnect, on_leaving)
    app.add_exception_handler(Exception, on_any)


class BodyLimit:
    """ASGI middleware that rejects bodies of more than `most` bytes, with or without Content-Length."""

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        taken = 0

        async def limited() -> dict[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise ApiError(413, f"the body has more than {self._most} bytes; send less")
            return message

        announced = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._most:
            error = ApiError(413, f"the body has {int(announced)} bytes, more than {self._most}; send less")
            return await JSONResponse(error.body(), 413)(scope, receive, send)
        await self._app(scope, limited if scope["type"] == "http" else receive, send)
