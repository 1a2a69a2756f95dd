"""The handler of POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from fastapi import Request as HTTPRequest
from fastapi.responses import Response
from pydantic import Field

from gptfast.generation import Request, Token
from gptfast.generation.json_grammar import JsonGrammar, json_grammar
from gptfast.serving.answers import Answer
from gptfast.serving.choices import IMPOSSIBLE, Choice, Form, Part, logprob_of
from gptfast.serving.errors import bad_requests
from gptfast.serving.protocol import MOST_LOGPROBS, ApiError, Sampling
from gptfast.serving.service import Service
from gptfast.serving.text import ChoiceText, printable_token
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.conversation import NONE, REASONING, ChatFormat

FORMAT_HEADER = "Gptfast-Chat-Format"
TOOLS = ("tools", "tool_choice", "functions", "function_call", "parallel_tool_calls")
FORMATS = ("text", "json_object")

log = logging.getLogger("uvicorn.error")  # the log of uvicorn


class ChatCompletion(Sampling):
    """The body of POST /v1/chat/completions."""

    EXPECTED: ClassVar[Mapping[str, str]] = {
        **Sampling.EXPECTED,
        "messages": "expected a list of objects with role and content",
        "chat_template_kwargs": "expected an object: variables of the chat template by name",
        "response_format": f"expected an object with a type, one of {', '.join(FORMATS)}",
    }
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    parallel_tool_calls: Any = None
    modalities: list[str] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None  # accepted, as `user`, and not used
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    def check_supported(self) -> None:
        for name in TOOLS:
            if getattr(self, name) and getattr(self, name) != "none":
                raise ApiError(400, f"{name}: tools are not supported; this model writes texts", name)
        if self.modalities and self.modalities != ["text"]:
            raise ApiError(400, f"modalities is {self.modalities}; this model writes texts only", "modalities")
        if self.store:
            raise ApiError(400, "store: this server keeps nothing; leave it out, or give false", "store")
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs without logprobs=true; set logprobs, or leave it out", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ApiError(
                400, "max_tokens and max_completion_tokens differ; give the latter alone", "max_completion_tokens"
            )
        both = (self.chat_template_kwargs or {}).get(REASONING)
        if self.reasoning_effort is not None and both not in (None, self.reasoning_effort):
            raise ApiError(
                400, f"{REASONING} and that of chat_template_kwargs differ; give the former alone", REASONING
            )
        kind = "text" if self.response_format is None else self.response_format.get("type")
        if kind not in FORMATS:
            raise ApiError(
                400,
                f"response_format.type is {kind!r}, which is not supported; expected one of {', '.join(FORMATS)}",
                "response_format",
            )
        if more := sorted(set(self.response_format or ()) - {"type"}):
            raise ApiError(
                400, f"response_format.{more[0]} is not supported; expected a type and nothing else", "response_format"
            )
        super().check_supported()

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.get("type") == "json_object"

    @property
    def length(self) -> tuple[str, int | None]:
        """The field of the largest number of tokens, and its value."""
        name = "max_completion_tokens" if self.max_tokens is None else "max_tokens"
        return name, getattr(self, name)


def _message(part: Part) -> dict[str, Any]:
    message = {"role": "assistant", "content": part["text"], "refusal": None}
    return _choice(part, message=message)


def _delta(part: Part) -> dict[str, Any]:
    role = {"role": "assistant", "content": ""} if part.get("opens") else {}
    return _choice(part, delta={**role, **({"content": part["text"]} if part["text"] else {})})


def _choice(part: Part, **content: Any) -> dict[str, Any]:
    logprobs = part["logprobs"] and {**part["logprobs"], "refusal": None}
    return {"index": part["index"], **content, "logprobs": logprobs, "finish_reason": part["finish_reason"]}


CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", _message, _delta)


class Chat:
    """Answers requests for replies to conversations.

    A conversation is written by the tokenizer's chat template. Where it has none, it is a plain transcript (see `ChatFormat`),
    and the log at the start and the header Gptfast-Chat-Format of each answer say so.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._failure = service, ""
        self.format: ChatFormat | None = None  # None: it cannot be used, for the reason in `_failure`
        try:
            self.format = ChatFormat.of(service.tokenizer)
        except (ImportError, ValueError, TypeError) as error:  # completions do not need it
            self._failure = str(error)

    def announce(self) -> None:
        """Say in the log how conversations are written, if not by a template."""
        if self.format is None:
            log.warning("chats are refused: %s", self._failure)
        elif self.format.template is None:
            log.info("the tokenizer has no chat template; chats are plain transcripts (System:, User:, Assistant:)")

    @property
    def template(self) -> str | None:
        """The source of the chat template; None: there is none."""
        return self.format.template.source if self.format and self.format.template else None

    async def complete(self, http: HTTPRequest) -> Response:
        accepted = await self._service.accept(http, ChatCompletion)
        ask, used = accepted.ask, self._used()
        with bad_requests("chat_template_kwargs"):
            variables = used.checked_variables(ask.chat_template_kwargs or {})
        with bad_requests(REASONING):
            variables |= used.checked_variables({REASONING: ask.reasoning_effort})
        with bad_requests("messages"):
            ids = await accepted.aside(self.prompt, ask.messages, variables)
            if not ids:
                raise ValueError("the chat template writes nothing for these messages; change them or the template")
        with bad_requests("response_format"):
            grammar = await asyncio.to_thread(self._grammar) if ask.wants_json else None
        with bad_requests():
            request = self._request(used, ask, ids, accepted.adapter, grammar)
        choices = [self._new_choice(used, ask, request, n) for n in range(request.config.num_return_sequences)]
        opening = [{**choice.part(""), "opens": True} for choice in choices]
        answer = Answer(ask, [request], choices, CHAT, accepted.deadline, opening, {FORMAT_HEADER: used.name})
        return await answer.respond(http, self._service.worker)

    def prompt(self, messages: list[dict[str, Any]], variables: Mapping[str, Any] = NONE) -> list[int]:
        """The ids of a conversation. Raises ApiError: no format.  ValueError: bad messages."""
        return self._used().prompt(messages, self._service.limits.special_tokens, variables)

    def _used(self) -> ChatFormat:
        if self.format is None:
            raise ApiError(500, f"this server cannot chat: {self._failure}", code="chat_template")
        return self.format

    def _grammar(self) -> JsonGrammar:
        return json_grammar(self._service.tokenizer, self._service.config.vocab_size)

    def _request(
        self, used: ChatFormat, ask: ChatCompletion, ids: list[int], adapter: str | None, grammar: JsonGrammar | None
    ) -> Request:
        """Raises ApiError for a request beyond the limits of the server."""
        service = self._service
        service.check_n(ask.n or 1)
        block, (name, asked) = service.block(adapter), ask.length
        service.check_room(len(ids), asked or 1, block, ("conversation", "messages", name))
        room = block - len(ids)
        usual = service.defaults.get("max_new_tokens", room)
        config = ask.options(
            service.defaults,
            service.seeds,
            max_new_tokens=min(usual, room) if asked is None else asked,
            stop_strings=[*ask.stops, *used.stops],
            eos_token_id=list(service.metadata.reply_ends(service.ends, used.end_ids)) or None,
        )
        first, wants = ask.first_stream(config, service.seeds), bool(ask.logprobs)
        options = {"logprobs": wants, "top": ask.top_logprobs or 0, "first_stream": first, "adapter": adapter}
        request = Request(ids, config, service.tokenizer, grammar=grammar, **options)
        service.check(request)
        return request

    def _new_choice(self, used: ChatFormat, ask: ChatCompletion, request: Request, index: int) -> Choice:
        tokenizer, flush = self._service.tokenizer, used.template is None
        text = ChoiceText(tokenizer, [*ask.stops, *used.stops], request.config.eos_ids, flush, used.channels())
        return Choice(index, text, _logprobs_with(tokenizer) if ask.logprobs else None)


def _logprobs_with(tokenizer: Tokenizer) -> Any:
    def of_token(token: Token) -> dict[str, Any]:
        own = -0.0 if token.logprob is None else max(token.logprob, IMPOSSIBLE)
        top = [_entry(tokenizer, other, logprob_of(probability)) for other, probability in token.top]
        return {"content": [{**_entry(tokenizer, token.id, own), "top_logprobs": top}]}

    return of_token


def _entry(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    content = list(tokenizer.decode_bytes([token]))
    return {"token": printable_token(tokenizer, token), "logprob": logprob, "bytes": content}
