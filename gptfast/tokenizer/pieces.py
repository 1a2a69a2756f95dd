"""Places where a long text can be cut so that the ids of the pieces join to the ids of the text.

Each pattern here ends at such a place, for any text before and after. None of them cuts inside a run of letters, digits or
punctuation, so a long run (a line of ten million letters) stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

BLOCK = 1 << 18  # characters (of a file: bytes) of a block that is read and encoded

# Before the first blank after a word, and before the last of several blanks, which joins the next word: GPT-2's pattern
# ends a word at the first and a run of blanks at the second. U+001C to U+001F are blanks in Python only.
_BLANK = r"[^\S\x1c-\x1f]"
_BLANKS = rf"\S(?={_BLANK})|{_BLANK}(?={_BLANK}\S)"
# Between a letter or digit and a punctuation mark; apostrophes may belong to a word ("don't").
_MARKS = r"[^\W_](?=[!\"#$%&()*+,\-./:;<=>?@\[\\\]^`{|}~\u3002\uff0c\u3001\uff1b\uff1a\uff01\uff1f\uff08\uff09\u300c\u300d\u2026\u201c\u201d])"
LINES = re.compile(r"\S\n(?=\S)")  # after a line: for unknown tokenizers
WORDS = re.compile(f"{_BLANKS}|{_MARKS}")  # WordTokenizer and CharTokenizer
GPT1 = re.compile(rf"\S(?=[ \t\n])|{_MARKS}")  # its normalizer drops U+0085 and joins the characters around it
GPT2 = re.compile(f"{_BLANKS}|{_MARKS}|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])")


def blocks_of(text: str, size: int = BLOCK) -> Iterator[str]:
    """A text in blocks of `size` characters."""
    return (text[at : at + size] for at in range(0, len(text), size))


def pieces(blocks: Iterable[str], cuts: re.Pattern[str] = LINES) -> Iterator[str]:
    """The text of `blocks` in pieces of about the same size, each ending where `cuts` matches.

    A block without such a place is joined to the next one.
    """
    held: list[str] = []
    for block in blocks:
        if not held:
            held.append(block)
            continue
        before = held[-1][-2:]
        found = cuts.search(before + block)
        if found is None:
            held.append(block)
            continue
        text = "".join([*held, block])
        at = len(text) - len(before + block) + found.end()
        yield text[:at]
        held = [text[at:]]
    if any(held):
        yield "".join(held)
