"""Server-sent events of a streamed answer: chunks with OpenAI's stream_options, then [DONE]."""

from __future__ import annotations

import json
import secrets
from typing import Any

from gptfast.serving.choices import Form, Part
from gptfast.serving.protocol import ApiError, StreamOptions

PADDED = 256  # bytes; chunks are padded to a multiple of it


class Events:
    """Formats the events of one answer.

    Args:
        options: of the request. They choose whether chunks have a field `usage`, and whether they are padded to equal sizes
            (`obfuscation`, random characters), which hides the lengths of texts in encrypted traffic.
        form: of the protocol.
        model: the name of the model.
    """

    def __init__(self, options: StreamOptions | None, form: Form, model: str) -> None:
        self._wants_usage = options is not None and bool(options.include_usage)
        self._padded = options is not None and bool(options.include_obfuscation)
        self._form, self._head = form, form.envelope(model, chunk=True)

    def parts(self, parts: list[Part]) -> bytes:
        """The chunks of parts of choices."""
        more = {"usage": None} if self._wants_usage else {}
        return b"".join(self._chunk({**self._head, "choices": [self._form.delta(part)], **more}) for part in parts)

    def end(self, usage: dict[str, int]) -> bytes:
        """The chunk with the usage, if requested, and [DONE]."""
        last = self._chunk({**self._head, "choices": [], "usage": usage}) if self._wants_usage else b""
        return last + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        return _event(error.body())

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        if self._padded:
            room = -len(_event({**chunk, "obfuscation": ""})) % PADDED
            chunk["obfuscation"] = secrets.token_urlsafe(room)[:room]
        return _event(chunk)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n\n"
