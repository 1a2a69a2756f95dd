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
    """A mask of queries and keys, per batch row: who sees whom, padding on either side, documents, a window.

    causal: whether a query sees no key after its own position.
    left_pad, seq_lens: (B,) int64, each row's first real key and the end of its real keys; None: 0, and all keys.
    cu_seqlens: (n + 1,) int32, documents of the rows, one row after another; None: each row is one document.
    window: keys that a query sees at most, None: no bound.
    """

    causal: bool = True
    left_pad: Tensor | None = None
    seq_lens: Tensor | None = None
    cu_seqlens: Tensor | None = None
    window: int | None = None


R = TypeVar("R")


def once(function: Callable[..., R]) -> Callable[..., R]:
    """A function of a mask, called once for each mask and its other arguments: all layers share the tensor."""
    known: dict[int, tuple[weakref.ref[Tensor], Any, tuple[Any, ...], R]] = {}

    @wraps(function)
    def cached(mask: Tensor, *others: Any) -> R:
        key = id(mask)
        entry = known.get(key)
        if entry is None or entry[0]() is not mask or entry[2] != others or not _is_as_it_was(mask, entry[1]):
            state = mask.clone() if mask.is_inference() else mask._version
            entry = (weakref.ref(mask, lambda _: known.pop(key, None)), state, others, function(mask, *others))
            known[key] = entry
        return entry[3]

    return cached


def _is_as_it_was(mask: Tensor, state: Any) -> bool:
    """state: the version of the mask, or a copy of it, as tensors of `torch.inference_mode` have no version."""
    return torch.equal(mask, state) if isinstance(state, Tensor) else mask._version == state


@once
def pattern_of(mask: Tensor) -> Pattern | None:
    """The pattern of a mask, or None where it says something else.

    Args:
        mask: (B, 1, T, S); bool, True where a key is seen; or float, 0 there and -inf (or the dtype's least value) elsewhere.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or not mask.numel():
        return None
    sees = _as_bool(mask)
    if sees is None:
        return None
    sees = sees[:, 0]
    T, S = sees.shape[1:]
    places = torch.arange(S, device=sees.device)
    count = sees.sum(-1)
    first = sees.to(torch.uint8).argmax(-1)  # of each query, (B, T); 0 where it sees nothing
    last = first + count - 1
    shown = (places >= first[..., None]) & (places <= last[..., None])
    if not torch.equal(shown, sees):  # holes
        return None
    seeing = count > 0
    found = None
    if T == S:
        ends = torch.where(seeing, last, -1).amax(-1) + 1
        found = _padded(first, last, seeing, ends, places) or _documents(first, last, seeing, places)
    return found or _the_same_for_all(first, last, S)


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
    """One document a row, with padding on the left and on the right (from `ends`), and perhaps a window."""
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
    left_pad = begins if bool(begins.any()) else None
    return Pattern(left_pad=left_pad, seq_lens=None if bool((ends == T).all()) else ends, window=window)


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


def _the_same_for_all(first: Tensor, last: Tensor, S: int) -> Pattern | None:
    """All queries of a row see the same keys, as in an encoder, or there is one query, as in a step with a cache."""
    if bool((first != first[:, :1]).any()) or bool((last != last[:, :1]).any()):
        return None
    left_pad, ends = first[:, 0], last[:, 0] + 1
    return Pattern(False, left_pad if bool(left_pad.any()) else None, None if bool((ends == S).all()) else ends)
