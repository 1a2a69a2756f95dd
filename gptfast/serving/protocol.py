"""The OpenAI completions protocol (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptfast.generation import Request, Token
from gptfast.generation.config import GenerationConfig
from gptfast.serving.text import ChoiceText, Offsets, printable_token
from gptfast.tokenizer import Tokenizer, encode_prompt

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_LOGPROBS = 20
MOST_STOPS = 4
IMPOSSIBLE = -9999.0  # OpenAI's log-probability for probability 0; JSON has no infinity
EXPECTED = {  # for fields with several types, where pydantic's message lists the error of each type
    "prompt": "expected a text, token ids, or a list of texts or of lists of token ids",
    "stop": f"expected a text, or a list of up to {MOST_STOPS}",
}


class ApiError(Exception):
    """An error that is answered in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def read_body(body: bytes) -> Completion:
    """Parse the body of a request.

    Raises:
        ApiError: the body is not valid; the message names the field.
    """
    try:
        return Completion.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"][: 1 if name in EXPECTED else None])
        message = first["msg"] if first["type"] == "missing" else EXPECTED.get(name or "", first["msg"])
        raise ApiError(400, f"{where or 'body'}: {message}", name) from None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Completion(BaseModel):
    """The body of POST /v1/completions. top_k, min_p and repetition_penalty are extensions (`extra_body`)."""

    model_config = ConfigDict(strict=True, extra="forbid")
    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    best_of: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    suffix: str | None = None
    user: str | None = None
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)

    def check_supported(self) -> None:
        """Raise ApiError for a field of the protocol that this server does not support."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(
                400, "best_of other than n is not supported; request n choices and choose by logprobs", "best_of"
            )
        if self.suffix:
            raise ApiError(400, "suffix is not supported; this model can only continue a text", "suffix")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options without stream=true; set stream, or leave them out", "stream_options")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise ApiError(400, f"stop is {self.stop!r}; expected 1 to {MOST_STOPS} texts that are not empty", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def prompts(self, tokenizer: Tokenizer, special: bool = True) -> list[list[int]]:
        """The token ids of each prompt; "" begins a new text where the vocabulary has an end token."""
        prompt: list[Any]
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            prompt = [self.prompt]
        else:
            prompt = list(self.prompt)
        if not prompt:
            raise ApiError(400, "prompt is empty; expected a text, token ids, or a list of these", "prompt")
        ids = [encode_prompt(tokenizer, part, special) if isinstance(part, str) else part for part in prompt]
        return [part or ([] if tokenizer.eos_id is None else [tokenizer.eos_id]) for part in ids]

    def request(
        self, ids: list[int], tokenizer: Tokenizer, room: int, seeds: SeedPool, defaults: Mapping[str, Any]
    ) -> Request:
        """The request for one prompt; `defaults` are the model's, for fields that the client does not set."""
        usual = defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS)
        max_tokens = min(usual, max(1, room)) if self.max_tokens is None else self.max_tokens
        options: dict[str, Any] = {
            "max_new_tokens": max(1, max_tokens),  # 0, for echo alone, is handled before
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "num_return_sequences": self.n,
            "seed": seeds.seed if self.seed is None else self.seed % 2**64,
            "stop_strings": self.stops,
            "logit_bias": self._bias(),
        }
        given = {name: value for name, value in options.items() if value is not None}
        config = GenerationConfig.of(**{"temperature": 1.0, **defaults, **given})
        first = seeds.take(config.num_return_sequences) if self.seed is None else 0
        wants = self.logprobs is not None
        return Request(ids, config, tokenizer, logprobs=wants, top=self.logprobs or 0, first_stream=first)

    def _bias(self) -> dict[int, float] | None:
        bias = self.logit_bias or {}
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError(400, f"logit_bias holds {token[:20]!r}; expected token ids as keys", "logit_bias")
        return {int(token): value for token, value in bias.items()} or None


class SeedPool:
    """Seeds of requests that name none: one secret seed, so that they are sampled in one call, and streams of their own."""

    def __init__(self) -> None:
        self.seed, self._next = secrets.randbits(63), 0

    def take(self, count: int) -> int:
        """Reserve `count` Philox streams; returns the first."""
        first, self._next = self._next, (self._next + count) % 2**32
        return first


class Choice:
    """A choice that is being generated."""

    def __init__(self, index: int, ask: Completion, request: Request, tokenizer: Tokenizer) -> None:
        self.index, self._ask, self._tokenizer = index, ask, tokenizer
        self._text = ChoiceText(tokenizer, ask.stops, request.config.eos_ids)
        self._offsets = Offsets(tokenizer)

    def echo(self, text: str, logprobs: dict[str, list[Any]] | None) -> dict[str, Any]:
        """The part that repeats the prompt."""
        self._offsets = Offsets(self._tokenizer, start=len(text))
        return self._part(text, logprobs, None)

    def push(self, token: Token) -> dict[str, Any]:
        """The part for a new token."""
        logprobs = None
        if self._ask.logprobs is not None:
            logprobs = {
                "tokens": [printable_token(self._tokenizer, token.id)],
                "token_logprobs": [None if token.logprob is None else max(token.logprob, IMPOSSIBLE)],
                "top_logprobs": [_by_text(self._tokenizer, token.top)] if self._ask.logprobs else None,
                "text_offset": [self._offsets.push(token.id)],
            }
        return self._part(self._text.push(token.id), logprobs, None)

    def finish(self, reason: str | None) -> dict[str, Any]:
        """The part after the last token."""
        return self._part(self._text.finish(), None, reason)

    def _part(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _by_text(tokenizer: Tokenizer, top: list[tuple[int, float]]) -> dict[str, float]:
    """{text: log-probability}; of tokens with equal text the most likely one."""
    found: dict[str, float] = {}
    for token, probability in top:
        found.setdefault(printable_token(tokenizer, token), math.log(probability) if probability > 0 else IMPOSSIBLE)
    return found


def prompt_logprobs(tokenizer: Tokenizer, ids: list[int], given: list[tuple[float, list]] | None, top: int) -> dict:
    """The logprobs of an echoed prompt. `given`: (logprob, top) of all tokens but the first, which has none."""
    texts, offsets = [printable_token(tokenizer, token) for token in ids], Offsets(tokenizer)
    given = given or []
    return {
        "tokens": texts,
        "token_logprobs": [None, *(max(logprob, IMPOSSIBLE) for logprob, _ in given)],
        "top_logprobs": [None, *(_by_text(tokenizer, likely) for _, likely in given)] if top else None,
        "text_offset": [offsets.push(token) for token in ids],
    }


def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The concatenation of the parts of a choice."""
    logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    whole: dict[str, Any] | None = None
    if logprobs:
        whole = {
            name: None if logprobs[0][name] is None else [value for part in logprobs for value in part[name]]
            for name in logprobs[0]
        }
    return {
        "index": parts[0]["index"],
        "text": "".join(part["text"] for part in parts),
        "logprobs": whole,
        "finish_reason": parts[-1]["finish_reason"],
    }


def envelope(model: str) -> dict[str, Any]:
    """The fields of every response and chunk other than its choices."""
    return {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
