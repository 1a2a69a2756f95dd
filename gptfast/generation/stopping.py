"""Stopping: why a sequence ends - an end token, a stop string, a grammar, its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptfast.generation.config import GenerationConfig
from gptfast.generation.json_grammar import JsonGrammar


class Stopping:
    """Decides whether the new tokens of a sequence end it.

    Args:
        config: its eos_token_id, stop_strings and max_new_tokens are used.
        tokenizer: of `gptfast.tokenizer`; only needed for stop strings.
        grammar: ends a text that is complete.
    Raises:
        TypeError, ValueError: stop strings without such a tokenizer.
    """

    def __init__(self, config: GenerationConfig, tokenizer: Any = None, grammar: JsonGrammar | None = None) -> None:
        self.tokenizer, self._grammar = tokenizer, grammar
        self._eos, self._max_new_tokens = frozenset(config.eos_ids), config.max_new_tokens
        self._stops = [text.encode("utf-8") for text in config.stop_strings or ()]
        if self._stops and tokenizer is None:
            raise ValueError(
                "generate: stop_strings without tokenizer; pass tokenizer=gptfast.tokenizer.load_tokenizer(folder)"
            )
        if self._stops and not hasattr(tokenizer, "decode_bytes"):
            raise TypeError(
                f"generate: tokenizer is a {type(tokenizer).__name__} without decode_bytes; stop_strings need one of "
                "gptfast.tokenizer, such as load_tokenizer(folder)"
            )

    @property
    def by_last_token(self) -> bool:
        """Whether an end token and the length alone end a sequence."""
        return not self._stops and self._grammar is None

    def reason(self, tokens: Sequence[int], start: int = 0) -> str | None:
        """Why a sequence ends: "stop" (an end token or a stop string) or "length"; None: it goes on.

        Args:
            tokens: the sequence.
            start: number of prompt tokens in it.
        """
        if tokens[-1] in self._eos or (self._stops and self._completes_stop(tokens[start:])):
            return "stop"
        if self._grammar is not None and self._grammar.complete(tokens[start:]):
            return "stop"
        most = self._max_new_tokens
        return "length" if most is not None and len(tokens) - start >= most else None

    def _completes_stop(self, new: Sequence[int]) -> bool:
        """Whether the last token completes a stop string; with an earlier one the sequence would have ended before."""
        longest = max(map(len, self._stops))
        tail = self.tokenizer.decode_bytes(self._with_text(new, longest))  # each token has at least one byte
        return any(stop in tail for stop in self._stops)

    def _with_text(self, new: Sequence[int], count: int) -> Sequence[int]:
        """The last `count` tokens with text. Tokens without text occur where a request asks for them."""
        has_token, tail = getattr(self.tokenizer, "has_token", None), new[-count:]
        if has_token is None or all(map(has_token, tail)):
            return tail
        return [token for token in new if has_token(token)][-count:]
