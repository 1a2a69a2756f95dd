"""The text of one choice, from tokens, up to its stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptfast.tokenizer import StreamDecoder, Tokenizer


class ChoiceText:
    """Turns tokens into text that is safe to send: never a part of a stop string, never half a character.

    Args:
        tokenizer: of the tokens.
        stops: texts that end the choice and are not a part of it.
        eos_ids: tokens that have no text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], eos_ids: Sequence[int]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._eos = stops, eos_ids
        self._held = ""  # may begin a stop string
        self._stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        if token in self._eos or self._stopped:
            return ""
        text = self._cut(self._held + self._decoder.push(token))
        keep = 0 if self._stopped else self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self._stopped:
            return ""
        text = self._cut(self._held + self._decoder.finish())
        self._held = ""
        return text

    def _cut(self, text: str) -> str:
        ends = [text.index(stop) for stop in self._stops if stop in text]
        self._stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _longest_beginning(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - n :]) for stop in self._stops):
                return n
        return 0


class Offsets:
    """Where each token of a text begins, in whole characters from the start."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer, self._at = tokenizer, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> int:
        """The offset of the next token."""
        offset = self._at
        self._at += len(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return offset


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or "bytes:\\xf0\\x9f" where it is only a part of a character, as OpenAI writes it."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
