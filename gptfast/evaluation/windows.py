"""The windows in which a long text is scored, as in the transformers documentation on perplexity of fixed-length models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from gptfast._checks import check_count


class Window(NamedTuple):
    """Tokens begin .. end - 1 are read; those from `first` on are scored, each after all tokens of the window before it.

    skips: whether token `begin` is scored in no window, because nothing stands before it.
    """

    begin: int
    end: int
    first: int
    skips: bool


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, each `stride` after the one before; a token is scored once, as early as it is seen.

    The first token of the first window has nothing before it and is not scored. Where stride == context this is so for
    every window.

    Args:
        tokens: length of the text.
        context: in [2, block_size].
        stride: in [1, context].
    """
    scored = 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        yield Window(begin, end, max(scored, begin + 1), scored <= begin)
        scored = end
        if end == tokens:
            return


def check_windows(owner: str, context: int | None, stride: int | None, block_size: int) -> tuple[int, int]:
    """(context, stride) with defaults: the model's block_size, and half a context.

    Raises:
        TypeError, ValueError: not a whole number, or out of range.
    """
    context = block_size if context is None else context
    check_count(owner, "context", context, 2, block_size, " (the model's block_size)")
    stride = max(1, context // 2) if stride is None else stride
    check_count(owner, "stride", stride, 1, context, " (the context: a larger one leaves tokens out)")
    return context, stride
