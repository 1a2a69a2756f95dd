"""Bytes, characters and words of the scored part of a text: what a loss is divided by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptfast.tokenizer import Tokenizer


@dataclass(slots=True)
class Counts:
    """Words are what whitespace separates; a word counts if a part of it is scored."""

    bytes: int = 0
    characters: int = 0
    words: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        self.bytes += other.bytes
        self.characters += other.characters
        self.words += other.words
        return self


def count_text(blocks: Iterable[str]) -> Counts:
    """The counts of a text that comes in blocks."""
    counts, inside = Counts(), False  # inside a word, at the end of the block before
    for block in blocks:
        if not block:
            continue
        counts.bytes += len(block) if block.isascii() else len(block.encode())
        counts.characters += len(block)
        counts.words += len(block.split()) - (inside and not block[0].isspace())
        inside = not block[-1].isspace()
    return counts


def count_token(tokenizer: Tokenizer, token: int, before: int | None, after: int | None) -> Counts:
    """What a text loses where one of its tokens is not scored.

    A character that two tokens share counts in the first. A word that reaches into the token before or after is not lost.

    Args:
        before, after: the tokens around it; None: it begins or ends the text.
    """
    content = tokenizer.decode_bytes([token])
    characters = sum(byte & 0xC0 != 0x80 for byte in content)  # all bytes of UTF-8 but those that continue a character
    text = _text(tokenizer, token)
    words = text.split()
    begun = before is not None and not text[:1].isspace() and not _text(tokenizer, before)[-1:].isspace()
    goes_on = after is not None and not text[-1:].isspace() and not _text(tokenizer, after)[:1].isspace()
    kept = min(len(words), begun + goes_on)
    return Counts(len(content), characters, len(words) - kept)


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")
