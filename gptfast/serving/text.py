"""The text of a choice: decoded tokens up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from gptfast.tokenizer import StreamDecoder, Tokenizer, token_text
from gptfast.tokenizer.conversation import Channels


class ChoiceText:
    """Decodes the tokens of a choice into text that can be sent: no part of a stop string, no part of a character.

    Args:
        tokenizer: decodes the tokens.
        stops: strings that end the choice and are not a part of its text.
        eos_ids: end tokens, which have no text.
        flush: leave out blanks at the beginning, as behind the "Assistant:" of a transcript.
        channels: leaves out the thoughts of a reply; None: it has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        eos_ids: Sequence[int],
        flush: bool = False,
        channels: Channels | None = None,
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops, self._eos, self._flush = stops, eos_ids, flush
        self._held = ""  # characters that may begin a stop string
        self._stopped, self._channels = False, channels

    def push(self, token: int) -> str:
        """The text that can be sent after this token."""
        if token in self._eos or self._stopped:
            return ""
        if self._channels is not None and not self._channels.keeps(token):
            return ""
        text = self._cut(self._held + self._decoder.push(token))
        keep = 0 if self._stopped else self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return self._from_left(text[: len(text) - keep])

    def finish(self) -> str:
        """The remaining text, after the last token."""
        if self._stopped:
            return ""
        text = self._cut(self._held + self._decoder.finish())
        self._held = ""
        return self._from_left(text)

    def _from_left(self, text: str) -> str:
        """What is sent, without blanks until there is another character; a stop string may have begun with these."""
        text = text.lstrip() if self._flush else text
        self._flush = self._flush and not text
        return text

    def _cut(self, text: str) -> str:
        ends = [text.index(stop) for stop in self._stops if stop in text]
        self._stopped = bool(ends)
        return text[: min(ends)] if ends else text

    def _longest_beginning(self, text: str) -> int:
        """The number of last characters that may begin a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - n :]) for stop in self._stops):
                return n
        return 0


class Offsets:
    """The offsets of tokens in a text, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer, self._at = tokenizer, start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> int:
        """The offset of the next token."""
        offset = self._at
        self._at += len(self._utf8.decode(self._tokenizer.decode_bytes([token])))
        return offset


def printable_token(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or OpenAI's "bytes:\\xf0\\x9f" where it is a part of a character."""
    text = token_text(tokenizer, token)
    return text if isinstance(text, str) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
