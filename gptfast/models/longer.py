"""A longer context for a trained GPT: position interpolation of learned positions, linear or YaRN scaling of rotary ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_count
from gptfast._rope import RopeScaling
from gptfast.config import GPTConfig

OWNER = "extend_context"
KINDS = ("yarn", "linear")  # the first is the default
_MOST = 2**31 - 1


def changed(config: GPTConfig, overrides: Mapping[str, Any]) -> GPTConfig:
    """A config with some fields changed; "extend_context" among them is a number of tokens, see `longer`."""
    given = dict(overrides)
    tokens = given.pop(OWNER, None)
    if tokens is None:
        return config.replace(**given)
    if given.get("block_size") is not None:
        raise ValueError(
            f"{OWNER} is {tokens} and block_size {given['block_size']}; give {OWNER} alone, which is the new block size"
        )
    scaling = given.pop("rope_scaling", None)
    return longer(config.replace(**given), tokens, scaling)


def longer(config: GPTConfig, tokens: int, rope_scaling: str | Mapping[str, Any] | None = None) -> GPTConfig:
    """The config of the model with a longer context.

    Rotary positions get transformers' `rope_scaling`: type, factor, and for YaRN original_max_position_embeddings, the context of
    the training. A model that has a scaling keeps its type; its new factor is over the first context.

    Args:
        config: with learned or rotary positions.
        tokens: the new block size, larger than the old one.
        rope_scaling: "yarn" (Peng et al., arXiv 2309.00071) or "linear" (position interpolation, Chen et al., arXiv 2306.15595);
            or a mapping with that as its "rope_type" and other keys of `RopeScaling`. None: the model's own, else "yarn".
    Raises:
        TypeError, ValueError: positions that have no scaling, a context that is not longer, another type than the model has.
    """
    check_count(OWNER, "tokens", tokens, 1, _MOST)
    if tokens <= config.block_size:
        raise ValueError(
            f"{OWNER} is {tokens}, but the model has a context of {config.block_size}; expected a longer one"
        )
    kind = config.position_embedding
    if kind == "rotary":
        return config.replace(block_size=tokens, rope_scaling=_scaling(config, tokens, rope_scaling))
    if rope_scaling is not None:
        raise ValueError(
            f"{OWNER}: rope_scaling is {rope_scaling!r}, but the model has {kind} positions, not rotary ones; leave it out"
        )
    if kind != "learned":
        raise ValueError(
            f"{OWNER}: the model has {kind} positions, which are computed for any length and have no scaling; load it with "
            f"block_size={tokens}"
        )
    return config.replace(block_size=tokens)


def _scaling(config: GPTConfig, tokens: int, told: str | Mapping[str, Any] | None) -> dict[str, Any]:
    own = RopeScaling.of(config.rope_scaling)
    given = {"rope_type": told} if isinstance(told, str) else dict(told or {})
    kind = given.get("rope_type") or (own.rope_type if own else KINDS[0])
    if kind not in KINDS or (own is not None and own.rope_type != kind):
        has = "" if own is None else f", and the model has {own.rope_type}"
        raise ValueError(f"{OWNER}: rope_scaling is {kind!r}{has}; expected {' or '.join(KINDS)}, as the model has it")
    base = {} if own is None else own.to_dict()
    first = base.get("original_max_position_embeddings") or config.block_size / base.get("factor", 1.0)
    found = {**base, **given, "rope_type": kind, "factor": given.get("factor", tokens / first)}
    return found | ({"original_max_position_embeddings": int(first)} if kind == "yarn" else {})


def stretched(table: Tensor, rows: int) -> Tensor:
    """Learned positions, (P, C), interpolated to more of them, (rows, C): the first and the last stay, and those between lie
    evenly. The neighbours of a token are then nearer than in the training."""
    places = torch.linspace(0, len(table) - 1, rows, dtype=torch.float64)
    below = places.floor().long().clamp(max=max(0, len(table) - 2))
    share = (places - below)[:, None]
    values = table.double()
    above = values[(below + 1).clamp(max=len(table) - 1)]
    return (values[below] * (1 - share) + above * share).to(table.dtype)


def fitted(table: Tensor, rows: int, stretch: bool) -> Tensor:
    """As many learned positions as a model has: the first of a table, or with `stretch` all of them, interpolated."""
    return stretched(table, rows) if stretch else table[:rows]
