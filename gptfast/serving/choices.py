"""The choices of an answer: parts of text with their log-probabilities, and how a protocol writes them."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptfast.generation import Request, Token
from gptfast.serving.protocol import Completion
from gptfast.serving.text import ChoiceText, Offsets, printable_token
from gptfast.tokenizer import Tokenizer

IMPOSSIBLE = -9999.0  # OpenAI's log-probability for probability 0; JSON has no infinity

Part = dict[str, Any]  # index, text, logprobs (lists by name, or None) and finish_reason of a piece of a choice


@dataclass(frozen=True)
class Form:
    """How a protocol writes an answer.

    prefix: of ids. object, chunk: the names of a whole answer and of a chunk of a stream.
    choice, delta: a part as an element of `choices`, in a whole answer and in a chunk.
    """

    prefix: str
    object: str
    chunk: str
    choice: Callable[[Part], dict[str, Any]]
    delta: Callable[[Part], dict[str, Any]]

    def envelope(self, model: str, chunk: bool = False) -> dict[str, Any]:
        """The fields of every answer, or chunk, other than its choices."""
        return {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "object": self.chunk if chunk else self.object,
            "created": int(time.time()),
            "model": model,
        }


COMPLETION = Form("cmpl", "text_completion", "text_completion", lambda part: part, lambda part: part)


class Choice:
    """A choice that is being generated.

    Args:
        index: its place among the choices of the answer.
        text: decodes its tokens.
        logprobs: the log-probabilities of a token as the protocol writes them, lists by name; None: not asked for.
    """

    def __init__(self, index: int, text: ChoiceText, logprobs: Callable[[Token], dict[str, Any]] | None = None) -> None:
        self.index, self._text, self._logprobs = index, text, logprobs

    def push(self, token: Token) -> Part:
        """The part for a new token."""
        logprobs = None if self._logprobs is None else self._logprobs(token)
        return self.part(self._text.push(token.id), logprobs)

    def finish(self, reason: str | None) -> Part:
        """The part after the last token."""
        return self.part(self._text.finish(), reason=reason)

    def part(self, text: str, logprobs: dict[str, Any] | None = None, reason: str | None = None) -> Part:
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class CompletionChoice(Choice):
    """A choice of a completion."""

    def __init__(self, index: int, ask: Completion, request: Request, tokenizer: Tokenizer) -> None:
        text = ChoiceText(tokenizer, ask.stops, request.config.eos_ids)
        super().__init__(index, text, self._of_token if ask.logprobs is not None else None)
        self._top, self._tokenizer, self._offsets = ask.logprobs, tokenizer, Offsets(tokenizer)

    def echo(self, text: str, logprobs: dict[str, list[Any]] | None) -> Part:
        """The part that repeats the prompt."""
        self._offsets = Offsets(self._tokenizer, start=len(text))
        return self.part(text, logprobs)

    def _of_token(self, token: Token) -> dict[str, Any]:
        return {
            "tokens": [printable_token(self._tokenizer, token.id)],
            "token_logprobs": [None if token.logprob is None else max(token.logprob, IMPOSSIBLE)],
            "top_logprobs": [_by_text(self._tokenizer, token.top)] if self._top else None,
            "text_offset": [self._offsets.push(token.id)],
        }


def logprob_of(probability: float) -> float:
    return math.log(probability) if probability > 0 else IMPOSSIBLE


def _by_text(tokenizer: Tokenizer, top: list[tuple[int, float]]) -> dict[str, float]:
    """{text: log-probability}; of tokens with equal text the most likely one."""
    found: dict[str, float] = {}
    for token, probability in top:
        found.setdefault(printable_token(tokenizer, token), logprob_of(probability))
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


def join(parts: list[Part]) -> Part:
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


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
