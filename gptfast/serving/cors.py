"""Cross-origin requests (CORS): the web pages that may use the server."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

OWN_MACHINE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s]+")


def check_origins(origins: Sequence[str]) -> None:
    """Raise ValueError for a string that is not an origin, "*" or "none"."""
    for origin in origins:
        if origin not in ("*", "none") and not _ORIGIN.fullmatch(origin):
            raise ValueError(
                f"serve: `cors_origin` is {origin!r}; expected the origin of a page, such as https://example.com or "
                "http://host:3000 (no path), * for all pages, or none"
            )
    if "none" in origins and len(origins) > 1:
        raise ValueError("serve: `cors_origin` has none and others; give none, or the others")


def is_allowed(origin: str, origins: Sequence[str]) -> bool:
    """Whether pages of an origin may use the server. origins: as in `allow_origins`."""
    if "none" in origins:
        return False
    return "*" in origins or origin in origins or re.fullmatch(OWN_MACHINE, origin) is not None


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Add the CORS middleware, which answers preflight requests (OPTIONS) and sets the CORS headers.

    Args:
        app: the application, with its other middleware already added.
        origins: allowed origins in addition to those of this machine (any port of localhost); "*": all; "none": none at
            all.
    """
    check_origins(origins)
    if "none" in origins:
        return
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_origin_regex=OWN_MACHINE,
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After", "Gptfast-Chat-Format"],
    )
