"""The handler of POST /v1/completions."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import Response

from gptfast.generation import Request
from gptfast.generation.prompts import check_prompt
from gptfast.generation.scoring import score_in_pieces
from gptfast.serving.answers import Answer
from gptfast.serving.choices import COMPLETION, CompletionChoice, Part, prompt_logprobs
from gptfast.serving.errors import bad_requests, worker_errors
from gptfast.serving.leaving import while_connected
from gptfast.serving.limits import Deadline
from gptfast.serving.protocol import ApiError, Completion
from gptfast.serving.service import Service


class Completions:
    """Answers requests for completions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, http: HTTPRequest) -> Response:
        service, tokenizer = self._service, self._service.tokenizer
        accepted = await service.accept(http, Completion)
        ask, deadline = accepted.ask, accepted.deadline
        with bad_requests():
            prompts = await accepted.aside(ask.prompts, tokenizer, service.limits.special_tokens)
            requests = self._requests(ask, prompts, accepted.adapter)
        choices = [
            CompletionChoice(n * request.config.num_return_sequences + stream, ask, request, tokenizer)
            for n, request in enumerate(requests)
            for stream in range(request.config.num_return_sequences)
        ]
        answer = Answer(ask, requests, choices, COMPLETION, deadline)
        if ask.echo:
            with worker_errors():
                answer.opening = await while_connected(http, self._echo(ask, requests, choices, deadline))
        if ask.max_tokens != 0:
            return await answer.respond(http, service.worker)
        if not ask.echo:
            raise ApiError(400, "max_tokens=0 is for echo=true; expected at least 1", "max_tokens")
        return answer.opening_alone()

    def _requests(self, ask: Completion, prompts: list[list[int]], adapter: str | None) -> list[Request]:
        """A request for each prompt. Raises ApiError for requests beyond the limits of the server."""
        service = self._service
        n, block = ask.n or 1, service.block(adapter)
        service.check_n(n)
        most = service.worker.max_open
        if n * len(prompts) > most:
            raise ApiError(400, f"{len(prompts)} prompts, n={n}; this server accepts up to {most} texts", "prompt")
        asked = 1 if ask.max_tokens is None else ask.max_tokens
        for ids in prompts:
            service.check_room(len(ids), asked, block, ("prompt", "prompt", "max_tokens"))
        requests = [
            ask.request(ids, service.tokenizer, block - len(ids), service.seeds, service.defaults) for ids in prompts
        ]
        for request in requests:
            request.adapter = adapter
            if asked:
                service.check(request)
            else:  # read only: the one token that its config asks for is never made, and needs no room
                check_prompt("", request.prompt, service.config.vocab_size, block + 1, request.config)
        return requests

    async def _echo(
        self, ask: Completion, requests: list[Request], choices: list[CompletionChoice], deadline: Deadline
    ) -> list[Part]:
        """The parts that repeat the prompts, with their log-probabilities if requested."""
        parts = []
        for request in requests:
            logprobs = await self._prompt_logprobs(request, deadline) if ask.logprobs is not None else None
            for _ in range(request.config.num_return_sequences):
                parts.append(choices[len(parts)].echo(self._service.tokenizer.decode(request.prompt), logprobs))
        return parts

    async def _prompt_logprobs(self, request: Request, deadline: Deadline) -> dict[str, Any]:
        runner, tokenizer = self._service.runner, self._service.tokenizer
        pieces = score_in_pieces(runner, request.prompt, request.top, tokenizer, adapter=request.adapter)
        given = await asyncio.wait_for(self._service.worker.run(pieces), deadline.left)
        return prompt_logprobs(tokenizer, request.prompt, given, request.top)
