"""What the endpoints of a server share: the model, its names, limits and defaults, and the checks of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import Request as HTTPRequest

from gptfast.generation import LanguageModel, Request, Runner
from gptfast.generation.runner import virtual_tokens
from gptfast.metadata import end_option, metadata_of
from gptfast.serving.limits import Deadline, Limits
from gptfast.serving.names import Names
from gptfast.serving.protocol import AnyModelBody, ApiError, SeedPool, read_body
from gptfast.serving.worker import Worker
from gptfast.tokenizer import Tokenizer

T = TypeVar("T")

LONG_BODY = 1 << 14  # bytes; longer bodies are tokenised in a thread, as they take more than milliseconds


@dataclass(frozen=True)
class Accepted(Generic[AnyModelBody]):
    """A request that has arrived whole, and whose fields are valid.

    ask: its body.
    size: of the body, in bytes.
    adapter: the one that `ask.model` names, as in `gptfast.generation.Request`.
    deadline: when it must be answered.
    """

    ask: AnyModelBody
    size: int
    adapter: str | None
    deadline: Deadline

    async def aside(self, call: Callable[..., T], *args: Any) -> T:
        """The result of a call on the content of the body; in a thread if that is long, while the streams of others go on."""
        return call(*args) if self.size < LONG_BODY else await asyncio.to_thread(call, *args)


class Service:
    """A served model.

    Args:
        model, tokenizer: to generate with.
        runner: the runner of the model from which all others are made.
        name: of the model, for clients.
        limits: of the server.
        worker: runs the requests.
    """

    def __init__(
        self, model: LanguageModel, runner: Runner, tokenizer: Tokenizer, name: str, limits: Limits, worker: Worker
    ) -> None:
        self.config, self.runner, self.tokenizer = model.config, runner, tokenizer
        self.names = Names(name, runner.adapters if runner.adapters_enabled else ())
        self.limits, self.worker, self.seeds = limits, worker, SeedPool()
        self.metadata = metadata_of(model)
        self.ends = self.metadata.end_tokens(model.config.vocab_size, [tokenizer.eos_id])
        self.defaults: dict[str, Any] = self.metadata.defaults()
        self.defaults["eos_token_id"] = end_option(self.ends)

    async def read(self, http: HTTPRequest) -> bytes:
        """The body of a request. Raises ApiError: it did not arrive in time."""
        try:
            return await asyncio.wait_for(http.body(), self.limits.client_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None

    async def accept(self, http: HTTPRequest, kind: type[AnyModelBody]) -> Accepted[AnyModelBody]:
        """Read and check a request to the model.

        Args:
            http: the request; its time begins when its body has arrived.
            kind: of its body.
        Raises:
            ApiError: it did not arrive in time, a field is wrong or not supported, or the model is unknown.
        """
        body = await self.read(http)
        deadline = Deadline(self.limits.seconds)
        ask = read_body(kind, body)
        adapter = self.names.adapter_of(ask.model)
        ask.check_supported()
        return Accepted(ask, len(body), adapter, deadline)

    def block(self, adapter: str | None) -> int:
        """The positions that a prompt and its text may have."""
        return self.config.block_size - virtual_tokens(self.runner, adapter)

    def check_n(self, n: int) -> None:
        """Raise ApiError where more texts of one prompt are asked for than run at a time."""
        if n > self.limits.max_rows:
            raise ApiError(400, f"n is {n}; this server generates up to {self.limits.max_rows} texts at a time", "n")

    def check_room(self, prompt: int, asked: int, block: int, names: tuple[str, str, str]) -> None:
        """Raise ApiError unless a prompt and its text fit into the context.

        Args:
            prompt, asked: numbers of tokens.
            block: as `block` returns it.
            names: what the client calls the prompt, its field, and the field of the number of tokens.
        """
        what, field, tokens = names
        if prompt + asked > block:
            raise ApiError(
                400,
                f"the context of this model is {block} tokens; the {what} has {prompt} and {tokens} is {asked} - shorten the "
                f"{what}, or lower {tokens}",
                field if prompt >= block else tokens,
                "context_length_exceeded",
            )

    def check(self, request: Request) -> None:
        """Raise TypeError or ValueError for what the scheduler would refuse."""
        self.worker.scheduler.check(request)
