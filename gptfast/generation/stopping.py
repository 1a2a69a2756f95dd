"""When a sequence ends: end tokens, stop strings, its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptfast.generation.config import GenerationConfig


class Stopping:
    """Tells of a sequence's new tokens whether they end it.

    Args:
        config: with eos_token_id, stop_strings and max_new_tokens.
        tokenizer: of `gptfast.tokenizer`; only stop strings need it.
    Raises:
        TypeError, ValueError: stop strings without a tokenizer.
    """

    def __init__(self, config: GenerationConfig, tokenizer: Any = None) -> None:
        self._config, self.tokenizer = config, tokenizer
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

    def reason(self, new: Sequence[int]) -> str | None:
        """Why the sequence ends with these new tokens: "stop" (an end token or a stop string) or "length"; None: not."""
        if new[-1] in self._config.eos_ids or self._completes_stop(new):
            return "stop"
        most = self._config.max_new_tokens
        return "length" if most is not None and len(new) >= most else None

    def _completes_stop(self, new: Sequence[int]) -> bool:
        """Whether the last token completes a stop string; earlier ones did not, or the sequence would have ended."""
        if not self._stops:
            return False
        longest = max(map(len, self._stops))
        tail = self.tokenizer.decode_bytes(self._with_text(new, longest))  # every one has a byte at least
        return any(stop in tail for stop in self._stops)

    def _with_text(self, new: Sequence[int], count: int) -> Sequence[int]:
        """The last `count` tokens that have text; some, which were asked for, may have none."""
        has_token, tail = getattr(self.tokenizer, "has_token", None), new[-count:]
        if has_token is None or all(map(has_token, tail)):
            return tail
        return [token for token in new if has_token(token)][-count:]
