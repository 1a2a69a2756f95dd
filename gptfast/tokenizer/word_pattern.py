"""The regular expression with which the `tokenizers` library splits a text into the tokens of `WordTokenizer`."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Sequence
from itertools import groupby

_LETTERS, _BLANKS = r"\p{L}\p{N}_", r"\s\x1c-\x1f"  # Python's \w and \s
_WORD = rf"[{_LETTERS}]+(?:['\u2019][{_LETTERS}]+)*"
_MARK, _BLANK = rf"[^{_LETTERS}{_BLANKS}]", rf"[{_BLANKS}]"
_MAY_END = rf"(?![{_LETTERS}]|['\u2019][{_LETTERS}])"
_IN_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_DEEPEST = 100  # letters; a tree of longer words can be too deep for the library


def split_pattern(tokens: Iterable[str]) -> str:
    """The regular expression (Oniguruma) for a vocabulary.

    A word or mark includes the one space before it. Where a single space is a token, only words that the vocabulary has
    with their space do. The expression lists these, because the library's model cannot try a second split.
    """
    tokens = set(tokens)
    if " " not in tokens:
        return f" ?{_WORD}| ?{_MARK}|{_BLANK}"
    known = sorted(token[1:] for token in tokens if token[0] == " " and token[1:])
    words = [token for token in known if _IN_WORD.fullmatch(token)]
    marks = [token for token in known if len(token) == 1 and not _IN_WORD.fullmatch(token)]
    listed = [f" (?:{_one_of(words)}){_MAY_END}"] if words else []
    listed += [f" (?:{'|'.join(map(_escaped, marks))})"] if marks else []
    return "|".join([*listed, _WORD, _MARK, _BLANK])


def _one_of(words: Sequence[str]) -> str:
    """An expression for one of several sorted words, as a tree of letters; a plain list would be tried word by word."""
    long = [_escaped(word) for word in words if len(word) > _DEEPEST]
    return "|".join([*_branches([word for word in words if len(word) <= _DEEPEST]), *long])


def _branches(words: Sequence[str]) -> list[str]:
    found = []
    for _, group in groupby(words, key=lambda word: word[0]):
        same = list(group)
        stem = os.path.commonprefix([same[0], same[-1]])  # noqa: RUF071 (of letters, as is wanted here)
        rest = [word[len(stem) :] for word in same]
        ends = rest[0] == ""
        longer = _branches(rest[1:] if ends else rest)
        tree = f"(?:{'|'.join(longer)})" + ("?" if ends else "") if longer else ""
        found.append(_escaped(stem) + tree)
    return found


def _escaped(text: str) -> str:
    """Every ASCII mark with a backslash; letters and other characters stand for themselves."""
    return re.sub(r"[!-/:-@\[-^`{-~]", r"\\\g<0>", text)
