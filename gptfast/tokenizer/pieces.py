"""Where a long text can be cut without a tokenizer noticing: the ids of the pieces, one after the other, are those of the
whole.

A pattern here ends at such a place, whatever stands before and after. None of them cuts inside a run of letters, digits or
marks, so a run that is long (a line of ten million letters) stays whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

BLOCK = 1 << 18  # characters, or bytes of a file, that are read and encoded at once

# Before a blank that follows none, and before the last blank of several, which goes with the word behind it: GPT-2's
# pattern ends a word at the one, and a run of blanks at the other. U+001C to U+001F are blanks in Python alone.
_BLANK = r"[^\S\x1c-\x1f]"
_BLANKS = rf"\S(?={_BLANK})|{_BLANK}(?={_BLANK}\S)"
# Behind a letter or a digit, before a mark that never belongs to a word; apostrophes may ("don't").
_MARKS = r"[^\W_](?=[!\"#$%&()*+,\-./:;<=>?@\[\\\]^`{|}~\u3002\uff0c\u3001\uff1b\uff1a\uff01\uff1f\uff08\uff09\u300c\u300d\u2026\u201c\u201d])"
LINES = re.compile(r"\S\n(?=\S)")  # after a line: for tokenizers that we know nothing of
WORDS = re.compile(f"{_BLANKS}|{_MARKS}")  # our words, and characters
GPT1 = re.compile(rf"\S(?=[ \t\n])|{_MARKS}")  # which drops U+0085, and joins what is beside it
GPT2 = re.compile(f"{_BLANKS}|{_MARKS}|[A-Za-z](?=[0-9])|[0-9](?=[A-Za-z])")


def blocks_of(text: str, size: int = BLOCK) -> Iterator[str]:
    """A text in blocks of `size` characters."""
    return (text[at : at + size] for at in range(0, len(text), size))


def pieces(blocks: Iterable[str], cuts: re.Pattern[str] = LINES) -> Iterator[str]:
    """The text that `blocks` join to, in pieces of about their size that end where `cuts` matches.

    A block without such a place joins the next, so each piece has at least one place to be cut, or is all there is.
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
