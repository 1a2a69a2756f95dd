"""The handler of POST /v1/completions, with whole and streamed answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gptfast.generation import LanguageModel, Request, Runner, Token
from gptfast.generation.prompts import check_prompt
from gptfast.generation.runner import virtual_tokens
from gptfast.generation.scoring import score_in_pieces
from gptfast.metadata import end_option, metadata_of
from gptfast.serving.errors import CLIENT_LEFT
from gptfast.serving.events import Events
from gptfast.serving.names import Names
from gptfast.serving.protocol import (
    ApiError,
    Choice,
    Completion,
    SeedPool,
    envelope,
    join,
    prompt_logprobs,
    read_body,
    usage,
)
from gptfast.serving.submission import Submission
from gptfast.serving.worker import QueueFull, ShuttingDown, Worker
from gptfast.tokenizer import Tokenizer

EVENT_STREAM = "text/event-stream"
LONG_BODY = 1 << 14  # bytes; longer bodies are tokenised in a thread, as they take more than milliseconds


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
        special_tokens: encode special tokens in prompts as such, see `gptfast.tokenizer.encode_prompt`.
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


class Server:
    """Answers requests for completions."""

    def __init__(
        self,
        model: LanguageModel,
        runner: Runner,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits,
        worker: Worker,
    ) -> None:
        self._config, self._runner, self._tokenizer = model.config, runner, tokenizer
        self.names = Names(name, runner.adapters)
        self._limits, self._worker, self._seeds = limits, worker, SeedPool()
        metadata, ends = metadata_of(model), [tokenizer.eos_id]
        self._defaults = metadata.defaults()
        self._defaults["eos_token_id"] = end_option(metadata.end_tokens(model.config.vocab_size, ends))

    async def complete(self, http: HTTPRequest) -> Response:
        body = await self.read(http)
        deadline = Deadline(self._limits.seconds)
        ask = read_body(body)
        adapter = self.names.adapter_of(ask.model)
        ask.check_supported()
        try:
            if len(body) < LONG_BODY:
                prompts = ask.prompts(self._tokenizer, self._limits.special_tokens)
            else:  # aside: the streams of others go on meanwhile
                prompts = await asyncio.to_thread(ask.prompts, self._tokenizer, self._limits.special_tokens)
            requests = self._requests(ask, prompts, adapter)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error).removeprefix("generate: ")) from None
        choices = [
            Choice(n * request.config.num_return_sequences + stream, ask, request, self._tokenizer)
            for n, request in enumerate(requests)
            for stream in range(request.config.num_return_sequences)
        ]
        try:
            echoed = await self._echo(ask, requests, choices, deadline) if ask.echo else []
            if ask.max_tokens == 0:
                return self._echo_alone(ask, requests, echoed)
            submission = self._worker.submit(requests, streams=bool(ask.stream))
        except Exception as error:
            raise _as_api_error(error) from error
        if ask.stream:
            return SubmissionResponse(
                self._stream(ask, submission, choices, echoed, deadline), self._worker, submission
            )
        return await self._whole(http, ask.model, submission, choices, echoed, deadline)

    async def read(self, http: HTTPRequest) -> bytes:
        """The body of a request. Raises ApiError: it did not arrive in time."""
        try:
            return await asyncio.wait_for(http.body(), self._limits.client_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not arrive in time") from None

    def _requests(self, ask: Completion, prompts: list[list[int]], adapter: str | None) -> list[Request]:
        """A request for each prompt. Raises ApiError for requests beyond the limits of the server."""
        n, block = ask.n or 1, self._config.block_size - virtual_tokens(self._runner, adapter)
        if n > self._limits.max_rows:
            raise ApiError(400, f"n is {n}; this server generates up to {self._limits.max_rows} texts at a time", "n")
        if n * len(prompts) > self._worker.max_open:
            raise ApiError(
                400, f"{len(prompts)} prompts, n={n}; this server accepts up to {self._worker.max_open} texts", "prompt"
            )
        asked = 1 if ask.max_tokens is None else ask.max_tokens
        for ids in prompts:
            if len(ids) + asked > block:
                raise ApiError(
                    400,
                    f"the context of this model is {block} tokens; the prompt has {len(ids)} and max_tokens "
                    f"is {asked} - shorten the prompt, or lower max_tokens",
                    "prompt" if len(ids) >= block else "max_tokens",
                    "context_length_exceeded",
                )
        requests = [ask.request(ids, self._tokenizer, block - len(ids), self._seeds, self._defaults) for ids in prompts]
        for request in requests:
            request.adapter = adapter
            if asked:
                self._worker.scheduler.check(request)
            else:  # read only: the one token that its config asks for is never made, and needs no room
                check_prompt("", request.prompt, self._config.vocab_size, block + 1, request.config)
        return requests

    async def _echo(
        self, ask: Completion, requests: list[Request], choices: list[Choice], deadline: Deadline
    ) -> list[dict[str, Any]]:
        """The parts that repeat the prompts, with their log-probabilities if requested."""
        parts = []
        for request in requests:
            logprobs = await self._prompt_logprobs(request, deadline) if ask.logprobs is not None else None
            for _ in range(request.config.num_return_sequences):
                parts.append(choices[len(parts)].echo(self._tokenizer.decode(request.prompt), logprobs))
        return parts

    async def _prompt_logprobs(self, request: Request, deadline: Deadline) -> dict[str, Any]:
        pieces = score_in_pieces(self._runner, request.prompt, request.top, self._tokenizer, adapter=request.adapter)
        scoring = self._worker.run(pieces)
        given = await asyncio.wait_for(scoring, deadline.left)
        return prompt_logprobs(self._tokenizer, request.prompt, given, request.top)

    def _echo_alone(self, ask: Completion, requests: list[Request], echoed: list[dict[str, Any]]) -> Response:
        if not ask.echo:
            raise ApiError(400, "max_tokens=0 is for echo=true; expected at least 1", "max_tokens")
        used = usage(sum(len(request.prompt) for request in requests), 0)
        choices = [{**part, "finish_reason": "length"} for part in echoed]
        if ask.stream:
            events = Events(ask, ask.model)
            return Response(events.parts(choices) + events.end(used), media_type=EVENT_STREAM)
        return JSONResponse({**envelope(ask.model), "choices": choices, "usage": used})

    async def _parts(
        self, submission: Submission, choices: list[Choice], deadline: Deadline
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The parts of all choices as they are generated; events that arrive together become one part per choice."""
        first: dict[Request, int] = {}
        for request in submission.requests:
            first[request] = sum(known.config.num_return_sequences for known in first)
        async for events in submission.events(deadline.left, self._worker.pause):
            by_choice: dict[int, list[dict[str, Any]]] = {}
            for event in events:
                if isinstance(event, Token):
                    index = first[event.request] + event.index
                    by_choice.setdefault(index, []).append(choices[index].push(event))
                elif isinstance(event, Request):
                    for sequence in event.sequences:
                        index = first[event] + sequence.index
                        by_choice.setdefault(index, []).append(choices[index].finish(sequence.finish))
            yield [join(parts) for parts in by_choice.values()]

    async def _whole(
        self,
        http: HTTPRequest,
        model: str,
        submission: Submission,
        choices: list[Choice],
        echoed: list[dict[str, Any]],
        deadline: Deadline,
    ) -> Response:
        async def collect() -> list[dict[str, Any]]:
            by_choice: list[list[dict[str, Any]]] = [[] for _ in choices]
            for part in echoed:
                by_choice[part["index"]].append(part)
            async for parts in self._parts(submission, choices, deadline):
                for part in parts:
                    by_choice[part["index"]].append(part)
            return [join(parts) for parts in by_choice]

        collecting, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=CLIENT_LEFT)
            joined = collecting.result()
        except Exception as error:
            raise _as_api_error(error) from error
        finally:
            leaving.cancel()
            collecting.cancel()
            self._worker.cancel(submission)
        return JSONResponse({**envelope(model), "choices": joined, "usage": _usage(submission)})

    async def _stream(
        self,
        ask: Completion,
        submission: Submission,
        choices: list[Choice],
        echoed: list[dict[str, Any]],
        deadline: Deadline,
    ) -> AsyncIterator[bytes]:
        """The server-sent events of a streamed answer."""
        events = Events(ask, ask.model)
        try:
            if echoed:
                yield events.parts(echoed)
            async for parts in self._parts(submission, choices, deadline):
                if data := events.parts([p for p in parts if p["text"] or p["logprobs"] or p["finish_reason"]]):
                    yield data
        except Exception as error:
            yield events.error(_as_api_error(error))
            return
        yield events.end(_usage(submission))


class SubmissionResponse(StreamingResponse):
    """A streamed response that cancels its requests when it ends, also when the client leaves."""

    def __init__(self, events: AsyncIterator[bytes], worker: Worker, submission: Submission) -> None:
        super().__init__(events, media_type=EVENT_STREAM)
        self._worker, self._submission = worker, submission

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.cancel(self._submission)


def _usage(submission: Submission) -> dict[str, int]:
    made = sum(sequence.num_new for request in submission.requests for sequence in request.sequences)
    return usage(sum(len(request.prompt) for request in submission.requests), made)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, "too many requests are running and waiting; try again later", code="queue_full")
    if isinstance(error, ShuttingDown):
        return ApiError(503, "the server is shutting down", code="shutting_down")
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return ApiError(504, "the completion was not ready in time; ask for fewer tokens", code="timeout")
    return ApiError(500, str(error) or type(error).__name__)


async def _disconnected(http: HTTPRequest) -> None:
    """Wait until the client has disconnected."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
