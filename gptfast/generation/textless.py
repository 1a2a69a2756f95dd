"""Ids without text, in a vocabulary that is padded for speed (50,304 rows for 50,257 tokens) or has holes.

Where there is a tokenizer such ids are not generated, unless a request names them: with a positive logit_bias, or as an end
token. V vocabulary.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gptfast.generation.config import GenerationConfig

_known: WeakKeyDictionary[Any, dict[int, frozenset[int]]] = WeakKeyDictionary()


def textless_ids(tokenizer: Any, V: int) -> frozenset[int]:
    """The ids below V for which the tokenizer has no token; none for a tokenizer without `has_token`."""
    if not hasattr(tokenizer, "has_token"):
        return frozenset()
    with suppress(TypeError):  # tokenizers that cannot be keys of a dict are not cached
        if V in _known.setdefault(tokenizer, {}):
            return _known[tokenizer][V]
    found = frozenset(token for token in range(V) if not tokenizer.has_token(token))
    with suppress(TypeError):
        _known[tokenizer][V] = found
    return found


def choosing_text(config: GenerationConfig, tokenizer: Any, V: int) -> GenerationConfig:
    """The config with the ids without text excluded."""
    asked = {token for token, value in (config.logit_bias or {}).items() if value > 0} | set(config.eos_ids)
    forbidden = textless_ids(tokenizer, V) - asked
    if not forbidden:
        return config
    usable = min(config.usable_vocab or V, V)
    while usable > 1 and usable - 1 in forbidden:
        usable -= 1
    holes = {token for token in forbidden if token < usable} | set(config.suppress_tokens or ())
    return replace(config, usable_vocab=usable if usable < V else 0, suppress_tokens=tuple(sorted(holes)) or None)


def likeliest(scores: Tensor, count: int, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """The `count` largest scores of the last dimension and their ids, without the ids that have no text."""
    hidden = textless_ids(tokenizer, scores.shape[-1])
    if hidden:
        scores = scores.index_fill(-1, torch.tensor([*hidden], dtype=torch.int64, device=scores.device), -math.inf)
    values, ids = scores.topk(min(count, scores.shape[-1] - len(hidden)))
    return values, ids
