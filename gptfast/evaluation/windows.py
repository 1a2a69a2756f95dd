"""The windows in which a long text is scored, as in the transformers documentation on perplexity of fixed-length models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gptfast._checks import check_count


class Window(NamedTuple):
    """ids: the tokens that are read; those from ids[first] on are scored, each after all tokens of the window before it.

    skips: whether ids[0] is scored in no window, because nothing stands before it.
    before: the token of the text before ids[0]; None at its beginning.
    """

    ids: np.ndarray
    first: int
    skips: bool
    before: int | None


def windows(chunks: Iterable[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """Windows of at most `context` tokens, each `stride` after the one before; a token is scored once, as early as it is seen.

    The first token of the first window has nothing before it and is not scored. Where stride == context this is so for
    every window. No more than a chunk and a window is held.

    Args:
        chunks: the ids of the text, uint32, in order.
        context: at least 2.
        stride: in [1, context].
    """
    held, at = np.empty(0, np.uint32), 0  # the tokens from `at` on
    begin, scored, rest, more = 0, 0, iter(chunks), True
    while True:
        if more and at + len(held) < begin + context:
            drop = max(0, begin - 1 - at)
            parts, at = [held[drop:]], at + drop
            size = len(parts[0])
            while more and at + size < begin + context:
                chunk = next(rest, None)
                more = chunk is not None
                if chunk is not None:
                    parts.append(chunk)
                    size += len(chunk)
            held = np.concatenate(parts)
        end = min(begin + context, at + len(held))
        if end == scored:
            return
        before = int(held[begin - 1 - at]) if begin else None
        yield Window(held[begin - at : end - at], max(scored - begin, 1), scored <= begin, before)
        scored, begin = end, begin + stride


def check_windows(owner: str, context: int | None, stride: int | None, room: int) -> tuple[int, int]:
    """(context, stride) with defaults: `room`, the model's block_size less the virtual tokens of a soft prompt; and half a context.

    Raises:
        TypeError, ValueError: not a whole number, or out of range.
    """
    context = room if context is None else context
    check_count(owner, "context", context, 2, room, " (the model's block_size, less a soft prompt)")
    stride = max(1, context // 2) if stride is None else stride
    check_count(owner, "stride", stride, 1, context, " (the context: a larger one leaves tokens out)")
    return context, stride
