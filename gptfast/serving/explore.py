"""POST /next_tokens and POST /beam_tree: what the model says of the next token, for the page; extensions of the protocol."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from gptfast.generation.beam_tree import beam_tree_in_pieces
from gptfast.generation.config import GenerationConfig
from gptfast.generation.next_tokens import next_tokens_in_pieces
from gptfast.generation.prompts import check_prompt
from gptfast.serving.chat import Chat
from gptfast.serving.choices import logprob_of
from gptfast.serving.errors import bad_requests, worker_errors
from gptfast.serving.leaving import while_connected
from gptfast.serving.limits import Deadline
from gptfast.serving.protocol import ApiError, ModelBody
from gptfast.serving.service import Accepted, Service
from gptfast.serving.text import printable_token
from gptfast.tokenizer import encode_prompt
from gptfast.tokenizer.base import encode_part
from gptfast.tokenizer.chat import encode_bare

MOST_TOKENS, MOST_BEAMS, MOST_STEPS = 50, 8, 10
_OPTIONS = (  # of `NextTokens`, those of generation
    *("temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class Text(ModelBody):
    """A text, or a conversation whose reply begins; and what was written behind it."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    continuation: str = ""

    def check_supported(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "expected one of prompt and messages", "prompt")


class NextTokens(Text):
    """The body of POST /next_tokens. The penalties count the tokens of `continuation` as new."""

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    top: int = Field(20, ge=1, le=MOST_TOKENS)


class BeamTree(Text):
    """The body of POST /beam_tree."""

    beams: int = Field(3, ge=1, le=MOST_BEAMS)
    steps: int = Field(4, ge=1, le=MOST_STEPS)


class Explore:
    """Answers requests about the next token. chat: writes conversations."""

    def __init__(self, service: Service, chat: Chat) -> None:
        self._service, self._chat = service, chat

    async def next_tokens(self, http: HTTPRequest) -> Response:
        service = self._service
        accepted = await service.accept(http, NextTokens)
        ask, adapter = accepted.ask, accepted.adapter
        ids, prompt_len = await self._ids(accepted, 0)
        with bad_requests():
            options = {name: getattr(ask, name) for name in _OPTIONS}
            config = GenerationConfig.of(max_new_tokens=1, seed=0, **options)
        pieces = next_tokens_in_pieces(service.runner, ids, config, ask.top, service.tokenizer, prompt_len, adapter)
        tokens = [
            {
                "id": token,
                "token": printable_token(service.tokenizer, token),
                "logprob": logprob_of(own),
                "probability": p,
            }
            for token, own, p in await self._run(http, pieces, accepted.deadline)
        ]
        return JSONResponse({"object": "next_tokens", "model": ask.model, "prompt_tokens": len(ids), "tokens": tokens})

    async def beam_tree(self, http: HTTPRequest) -> Response:
        service = self._service
        accepted = await service.accept(http, BeamTree)
        ask, adapter = accepted.ask, accepted.adapter
        ids, _ = await self._ids(accepted, ask.steps)
        with bad_requests("beams"):
            pieces = beam_tree_in_pieces(service.runner, ids, ask.beams, ask.steps, service.tokenizer, adapter)
        nodes = [
            {**node._asdict(), "text": printable_token(service.tokenizer, node.token)}
            for node in await self._run(http, pieces, accepted.deadline)
        ]
        return JSONResponse({"object": "beam_tree", "model": ask.model, "prompt_tokens": len(ids), "nodes": nodes})

    async def _ids(self, accepted: Accepted[Any], room: int) -> tuple[list[int], int]:
        """The ids of the text, and how many of them are the prompt's. Raises ApiError.

        room: positions that must be free behind them.
        """
        service, ask = self._service, accepted.ask
        with bad_requests("prompt" if ask.messages is None else "messages"):
            ids = await accepted.aside(self._encode, ask)
            prompt_len = len(ids)
            encode = encode_bare if service.limits.special_tokens else encode_part
            ids += encode(service.tokenizer, ask.continuation)
            ids = ids or ([] if service.tokenizer.eos_id is None else [service.tokenizer.eos_id])
            block = service.block(accepted.adapter)
            if len(ids) > block and not room:
                message = f"the context of this model is {block} tokens; the text has {len(ids)} - shorten it"
                raise ApiError(400, message, "prompt", "context_length_exceeded")
            service.check_room(len(ids), room, block, ("text", "prompt", "steps"))
            check_prompt("", ids, service.config.vocab_size, block + 1, GenerationConfig(max_new_tokens=1))
        return ids, prompt_len

    def _encode(self, ask: Text) -> list[int]:
        special = self._service.limits.special_tokens
        if ask.messages is None:
            return list(encode_prompt(self._service.tokenizer, ask.prompt or "", special))
        return list(self._chat.prompt(ask.messages))

    async def _run(self, http: HTTPRequest, pieces: Any, deadline: Deadline) -> Any:
        with worker_errors():
            running = asyncio.wait_for(self._service.worker.run(pieces), deadline.left)
            return await while_connected(http, running)
