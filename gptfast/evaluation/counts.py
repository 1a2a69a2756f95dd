"""Bytes, characters and words of the scored part of a text: what a loss is divided by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gptfast.tokenizer import Tokenizer


@dataclass
class Counts:
    """Words are what whitespace separates; a word counts where it begins."""

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


def count_token(tokenizer: Tokenizer, token: int, before: int | None) -> Counts:
    """The counts of one token of a text; a character that two tokens share counts in the first. before: the token before it;
    None: it begins the text."""
    text = tokenizer.decode_bytes([token])
    characters = sum(byte & 0xC0 != 0x80 for byte in text)  # all bytes of UTF-8 but those that continue a character
    inside = before is not None and not tokenizer.decode_bytes([before])[-1:].isspace()
    words = len(text.split()) - (inside and not text[:1].isspace() and bool(text))
    return Counts(len(text), characters, words)
