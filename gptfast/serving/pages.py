"""The pages at `/`: files of the package, with headers that let them load nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException

TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def read_page() -> dict[str, bytes]:
    """The files of the pages by name."""
    folder = resources.files("gptfast.serving").joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(tuple(TYPES))}


def add_page(app: FastAPI, methods: Sequence[str], index: str = "index.html") -> None:
    """Serve a page at `/` and the files of pages below `/page`. They hold nothing of the model and need no key.

    index: index.html, the page of a model, or run.html, that of a training run.
    """
    files = read_page()

    def answer(name: str) -> Response:
        kind = TYPES["." + name.rpartition(".")[2]]
        return Response(files[name], media_type=f"{kind}; charset=utf-8", headers=HEADERS)

    @app.api_route("/", methods=list(methods))
    async def page() -> Any:
        return answer(index)

    @app.api_route("/page/{name}", methods=list(methods))
    async def file(name: str) -> Any:
        if name not in files or name.endswith(".html"):
            raise HTTPException(404)
        return answer(name)
