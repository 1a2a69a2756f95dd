"""Requests of the OpenAI protocol (https://platform.openai.com/docs/api-reference): fields, their ranges, and errors."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptfast.generation import Request
from gptfast.generation.config import GenerationConfig
from gptfast.tokenizer import Tokenizer, encode_prompt

DEFAULT_MAX_TOKENS = 16  # OpenAI's, of a completion
MOST_LOGPROBS = 20
MOST_STOPS = 64  # OpenAI takes 4; tasks of lm-evaluation-harness name a dozen
MOST_OF_MESSAGE = 1000  # characters of an error; a message can quote a value of the request, of up to a megabyte


class ApiError(Exception):
    """An error that is answered in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        if len(message) > MOST_OF_MESSAGE:
            half = MOST_OF_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        types = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Body(BaseModel):
    """The body of a request. EXPECTED: for fields with several types, where pydantic's message lists the error of each."""

    model_config = ConfigDict(strict=True, extra="forbid")
    EXPECTED: ClassVar[Mapping[str, str]] = {}


AnyBody = TypeVar("AnyBody", bound=Body)


def read_body(kind: type[AnyBody], body: bytes) -> AnyBody:
    """Parse the body of a request.

    Raises:
        ApiError: the body is not valid; the message names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(part) for part in first["loc"][: 1 if name in kind.EXPECTED else None])
        if first["type"] == "extra_forbidden":
            fields = kind.model_fields if len(first["loc"]) == 1 else ()  # those inside of another are not the kind's
            alike = difflib.get_close_matches(where, fields, n=1, cutoff=0.8)
            message = f"this server has no such field; {f'did you mean {alike[0]}?' if alike else 'leave it out'}"
        else:
            message = first["msg"] if first["type"] == "missing" else kind.EXPECTED.get(name or "", first["msg"])
        raise ApiError(400, f"{where or 'body'}: {message}", name) from None


class ModelBody(Body):
    """The body of a request that the model answers."""

    model: str

    def check_supported(self) -> None:
        """Raise ApiError for a field that this server does not support, or fields that do not go together."""


AnyModelBody = TypeVar("AnyModelBody", bound=ModelBody)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampling(ModelBody):
    """The fields that all texts have. top_k, min_p and repetition_penalty are extensions (`extra_body`)."""

    EXPECTED: ClassVar[Mapping[str, str]] = {"stop": f"expected a text, or a list of up to {MOST_STOPS}"}
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    user: str | None = None
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)

    def check_supported(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options without stream=true; set stream, or leave them out", "stream_options")
        if len(self.stops) > MOST_STOPS or "" in self.stops:
            raise ApiError(400, f"stop is {self.stop!r}; expected 1 to {MOST_STOPS} texts that are not empty", "stop")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def options(self, defaults: Mapping[str, Any], seeds: SeedPool, **given: Any) -> GenerationConfig:
        """The options of generation.

        Args:
            defaults: the model's, for fields that the client does not set.
            seeds: gives the seed where the client sets none.
            given: options that are not fields.
        """
        asked: dict[str, Any] = {
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
            **given,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        return GenerationConfig.of(**{"temperature": 1.0, **defaults, **asked})

    def first_stream(self, config: GenerationConfig, seeds: SeedPool) -> int:
        """The first Philox stream of a request with this config."""
        return seeds.take(config.num_return_sequences) if self.seed is None else 0

    def _bias(self) -> dict[int, float] | None:
        bias = self.logit_bias or {}
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) < 10):
                raise ApiError(400, f"logit_bias holds {token[:20]!r}; expected token ids as keys", "logit_bias")
        return {int(token): value for token, value in bias.items()} or None


class Completion(Sampling):
    """The body of POST /v1/completions."""

    EXPECTED: ClassVar[Mapping[str, str]] = {
        **Sampling.EXPECTED,
        "prompt": "expected a text, token ids, or a list of texts or of lists of token ids",
    }
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    best_of: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None

    def check_supported(self) -> None:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(
                400, "best_of other than n is not supported; request n choices and choose by logprobs", "best_of"
            )
        if self.suffix:
            raise ApiError(400, "suffix is not supported; this model can only continue a text", "suffix")
        super().check_supported()

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
        """The request for one prompt. room: positions behind it; the others as in `options`."""
        usual = defaults.get("max_new_tokens", DEFAULT_MAX_TOKENS)
        max_tokens = min(usual, max(1, room)) if self.max_tokens is None else self.max_tokens
        config = self.options(defaults, seeds, max_new_tokens=max(1, max_tokens))  # 0 makes no token, see `complete`
        first, wants = self.first_stream(config, seeds), self.logprobs is not None
        return Request(ids, config, tokenizer, logprobs=wants, top=self.logprobs or 0, first_stream=first)


class SeedPool:
    """Seeds of requests that name none: one secret seed, so that they are sampled in one call, and streams of their own."""

    def __init__(self) -> None:
        self.seed, self._next = secrets.randbits(63), 0

    def take(self, count: int) -> int:
        """Reserve `count` Philox streams; returns the first."""
        first, self._next = self._next, (self._next + count) % 2**32
        return first
