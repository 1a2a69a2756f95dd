"""Reads attention masks: what a (B, 1, T, S) tensor of who sees whom says in the words of `gptfast.ops.causal_attention`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A causal mask of T queries and as many keys, per batch row: padding on either side, documents, a window.

    shift: (B,) int64, keys of padding on the left of each row; None: no row has any.
    lengths: (B,) int64, keys of each row without its padding; None: all rows are full.
    cu_seqlens: (n + 1,) int32, documents of the rows, one row after another; None: each row is one document.
    window: keys that a query sees at most, None: no bound.
    """

    shift: Tensor | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None
    window: int | None = None


R = TypeVar("R")


def once(function: Callable[..., R]) -> Callable[..., R]:
    """A function of a mask, called once for each mask and its other arguments: all layers share the tensor."""
    known: dict[int, tuple[weakref.ref[Tensor], int, tuple[Any, ...], R]] = {}

    @wraps(function)
    def cached(mask: Tensor, *others: Any) -> R:
        key = id(mask)
        entry = known.get(key)
        if entry is None or entry[0]() is not mask or entry[1:3] != (mask._version, others):
            entry = (weakref.ref(mask, lambda _: known.pop(key, None)), mask._version, others, function(mask, *others))
            known[key] = entry
        return entry[3]

    return cached


@once
def pattern_of(mask: Tensor) -> Pattern | None:
    """The pattern of a mask, or None where it says something else.

    Args:
        mask: (B, 1, T, T); bool, True where a key is seen; or float, 0 there and -inf (or the dtype's least value) elsewhere.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    sees = _as_bool(mask)
    if sees is None:
        return None
    sees = sees[:, 0]
    T = sees.shape[1]
    places = torch.arange(T, device=sees.device)
    count = sees.sum(-1)
    first = sees.to(torch.uint8).argmax(-1)  # of each query, (B, T); 0 where it sees nothing
    last = first + count - 1
    shown = (places >= first[..., None]) & (places <= last[..., None])
    if not torch.equal(shown, sees):  # holes
        return None
    seeing = count > 0
    ends = torch.where(seeing, last, -1).amax(-1) + 1
    return _padded(first, last, seeing, ends, places) or _documents(first, last, seeing, places)


def _as_bool(mask: Tensor) -> Tensor | None:
    """Who is seen; None for a mask of other numbers, such as a bias."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    sees = mask == 0
    least = torch.finfo(torch.float16).min if mask.dtype == torch.float16 else -1e30
    return sees if bool((sees | (mask <= least)).all()) else None


def _padded(first: Tensor, last: Tensor, seeing: Tensor, ends: Tensor, places: Tensor) -> Pattern | None:
    """One document a row, with padding on the left (shift keys) and on the right (from `ends`), and perhaps a window."""
    B, T = first.shape
    begins = torch.where(seeing, first, T).amin(-1)  # (B,)
    begins = torch.where(ends > 0, begins, 0)
    wanted_last = torch.minimum(places, ends[:, None] - 1)
    if bool((seeing & (last != wanted_last)).any()):
        return None
    span = torch.where(seeing, places - first + 1, 0)
    late = seeing & (first > begins[:, None])  # a window has cut these
    window = int(span[late].amax()) if bool(late.any()) else None
    lowest = begins[:, None].expand(B, T)
    if window is not None:
        lowest = torch.maximum(lowest, places - window + 1)
    visible = (places >= begins[:, None]) & (wanted_last >= lowest)
    if bool((visible != seeing).any()) or bool((seeing & (first != lowest)).any()):
        return None
    shift = begins if bool(begins.any()) else None
    lengths = ends - begins
    full = shift is None and bool((ends == T).all())
    return Pattern(shift, None if full else lengths, None, window)


def _documents(first: Tensor, last: Tensor, seeing: Tensor, places: Tensor) -> Pattern | None:
    """Documents packed into full rows: each query sees its own from the first position on."""
    B, T = first.shape
    if not bool(seeing.all()) or bool((last != places).any()) or bool((first[:, 1:] < first[:, :-1]).any()):
        return None
    starts = first == places
    if not bool(starts.gather(1, first).all()) or bool((starts.cumsum(-1).gather(1, first) != starts.cumsum(-1)).any()):
        return None
    begins = starts.flatten().nonzero().flatten()
    end = begins.new_tensor([B * T])
    return Pattern(cu_seqlens=torch.cat([begins, end]).to(torch.int32))
