"""Undoing the spaces that corpora put around punctuation, so that a text reads as it was written."""

from __future__ import annotations

import re
from collections.abc import Callable

# Pattern and replacement, in turn. WikiText's files separate tokens by spaces and write @-@ for a hyphen inside a word.
_WIKITEXT = [
    (r" @([-,.])@ ", r"\1"),
    (r"\( ([^()\n]*?) \)", r"(\1)"),
    (r"\[ ([^\[\]\n]*?) \]", r"[\1]"),
    (r"\{ ([^{}\n]*?) \}", r"{\1}"),
    (r'" ([^"\n]*?) "', r'"\1"'),
    (r"(?<=\w) 's\b", "'s"),
    (r"(?<=s) ' (?=\w)", "' "),
    (r"(?<=\S) ([,.;:!?])(?=\s|$)", r"\1"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r"(?m)^ | $", ""),
]


def wikitext(text: str) -> str:
    """A text of WikiText-2 or WikiText-103, without the spaces of its tokens."""
    for pattern, replacement in _WIKITEXT:
        text = re.sub(pattern, replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str] | None] = {"none": None, "wikitext": wikitext}
