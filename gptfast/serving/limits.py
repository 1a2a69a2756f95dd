"""The limits of a server, and the time of an answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Args:
        max_rows: sequences that run at a time.
        max_queue: sequences that wait, and prompts that are scored; further ones are rejected with 429.
        max_positions: positions of all running sequences together; None: max_rows full ones.
        max_prompt_tokens: tokens of new prompts per step; a lower limit delays running sequences less.
        seconds: time for an answer, from the arrival of the whole request; then 504.
        client_seconds: time for a client to send its request; then 408.
        max_connections: connections at a time, waiting ones included; further ones are rejected with 503. None: 1024 or
            four per text, within the limit of open files.
        max_body: bytes of a request; larger ones are rejected with 413.
        max_events: chunks per second of all streams together. With many streams a chunk has the tokens of several steps,
            because sending each token separately would take CPU time from generation.
        special_tokens: encode special tokens in prompts and messages as such, see `gptfast.tokenizer.encode_prompt`.
    """

    max_rows: int = 16
    max_queue: int = 64
    max_positions: int | None = None
    max_prompt_tokens: int = 2048
    seconds: float = 600.0
    client_seconds: float = 30.0
    max_connections: int | None = None
    max_body: int = 1 << 20
    max_events: float = 200.0
    special_tokens: bool = True


class Deadline:
    """The time at which an answer must be complete."""

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + seconds

    @property
    def left(self) -> float:
        return self._end - self._loop.time()
