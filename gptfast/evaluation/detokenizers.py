"""Undoing the spaces that corpora put around punctuation, so that a text reads as it was written."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

# Pattern and replacement, in turn. WikiText's files separate tokens by spaces and write @-@ for a hyphen inside a word.
# No pattern reaches over the end of a line, so that a text can be rewritten in parts of whole lines.
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


def by_lines(detokenize: Callable[[str], str], blocks: Iterable[str]) -> Iterator[str]:
    """A text, which comes in blocks, rewritten in parts of whole lines."""
    held: list[str] = []
    for block in blocks:
        cut = block.rfind("\n") + 1
        if cut:
            yield detokenize("".join([*held, block[:cut]]))
            held.clear()
        held.append(block[cut:])
    yield detokenize("".join(held))


DETOKENIZERS: dict[str, Callable[[str], str] | None] = {"none": None, "wikitext": wikitext}
