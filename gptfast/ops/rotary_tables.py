"""Tables of cosines and sines for `rotary`: frequencies, and how they are scaled for contexts longer than the trained one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptfast._checks import check_choice, check_count, check_real

OP = "rotary_tables"


def rotary_tables(
    n: int,
    dim: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position p times frequency i, theta^(-2 i / dim), for `rotary`: the numbers of transformers, to the bit.

    scaling is the dictionary of transformers' configurations (`rope_scaling`, `rope_parameters`), by its "rope_type":

    - "default": none.
    - "linear": frequencies divided by `factor` (position interpolation, Chen et al., arXiv 2306.15595).
    - "yarn" (Peng et al., arXiv 2309.00071): frequencies with more than `beta_fast` turns (32) in
      `original_max_position_embeddings` positions stay, those with fewer than `beta_slow` (1) are divided by `factor`, a ramp
      between. Tables are multiplied by `attention_factor` (None: 0.1 ln(factor) + 1, or from `mscale` and `mscale_all_dim`).
      `truncate`: whether the ramp begins and ends at whole channels (True; gpt-oss has False).
    - "llama3": wavelengths above `original_max_position_embeddings` / `low_freq_factor` are multiplied by `factor`, those below
      ... / `high_freq_factor` stay, a ramp between.

    Args:
        n: positions, from 0 on.
        dim: channels that are rotated, even: head_dim, or a part of it.
        theta: the base, > 0 and not 1.
        scaling: None or the dictionary; its "rope_theta" and "partial_rotary_factor" are theta's and dim's business and are
            not read.
        device: of the tables; None: torch's default.
    Returns:
        (cos, sin), each (n, dim / 2) float32.
    Raises:
        TypeError, ValueError: a wrong number, an unknown rope_type, a key that is missing or unknown.
    """
    check_count(OP, "n", n, least=0)
    check_count(OP, "dim", dim)
    if dim % 2:
        raise ValueError(f"{OP}: dim is {dim}; expected an even number, pairs of channels")
    check_real(OP, "theta", theta, "a finite number > 0 other than 1", lambda x: 0 < x < math.inf and x != 1)
    frequencies, attention_factor = _scaled(dim, float(theta), scaling, device)
    # angles in float32, as models have been trained with them: exact ones would be other models'
    angles = torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _scaled(
    dim: int, theta: float, scaling: Mapping[str, Any] | None, device: torch.device | str | None
) -> tuple[Tensor, float]:
    """The frequencies, (dim / 2) float32, and the factor of the tables."""
    periods = theta ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return 1.0 / periods, 1.0
    if not isinstance(scaling, Mapping):
        raise TypeError(f"{OP}: scaling is {scaling!r}; expected None or a dictionary with a rope_type")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    check_choice(OP, "rope_type of scaling", kind, tuple(_KINDS))
    scale, needed, optional = _KINDS[kind]
    given = {key: value for key, value in scaling.items() if key not in _NOT_READ}
    for key in needed:
        if given.get(key) is None:
            raise ValueError(f"{OP}: scaling has no {key}, which {kind} needs")
    for key, value in given.items():
        if key not in (*needed, *optional):
            raise ValueError(
                f"{OP}: scaling has {key!r}; {kind} takes {', '.join((*needed, *optional)) or 'nothing else'}"
            )
        if key != "truncate" and value is not None:
            check_real(OP, f"{key} of scaling", value, "a finite number > 0", lambda x: 0 < x < math.inf)
    if not isinstance(given.get("truncate", True), bool):
        raise TypeError(f"{OP}: truncate of scaling is {given['truncate']!r}; expected True or False")
    return scale(periods, dim, theta, given)


def _default(periods: Tensor, dim: int, theta: float, given: dict[str, Any]) -> tuple[Tensor, float]:
    return 1.0 / periods, 1.0


def _linear(periods: Tensor, dim: int, theta: float, given: dict[str, Any]) -> tuple[Tensor, float]:
    return 1.0 / periods / given["factor"], 1.0


def _yarn(periods: Tensor, dim: int, theta: float, given: dict[str, Any]) -> tuple[Tensor, float]:
    factor, length = given["factor"], given["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        """The channel, a real number, whose frequency makes `turns` turns in `length` positions."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel(given.get("beta_fast") or 32), channel(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # a step, not a division by 0
    places = torch.arange(dim // 2, device=periods.device, dtype=torch.float32)
    kept = 1 - ((places - first) / (last - first)).clamp(0, 1)
    frequencies = 1.0 / (factor * periods) * (1 - kept) + 1.0 / periods * kept
    return frequencies, _yarn_attention_factor(given)


def _yarn_attention_factor(given: dict[str, Any]) -> float:
    factor, stated = given["factor"], given.get("attention_factor")
    if stated is not None:
        return stated

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return growth(given["mscale"]) / growth(given["mscale_all_dim"])
    return growth(1)


def _llama3(periods: Tensor, dim: int, theta: float, given: dict[str, Any]) -> tuple[Tensor, float]:
    factor, length = given["factor"], given["original_max_position_embeddings"]
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    if not low < high:
        raise ValueError(
            f"{OP}: low_freq_factor of scaling is {low} and high_freq_factor {high}; expected the first below"
        )
    frequencies = 1.0 / periods
    lengths = 2 * math.pi / frequencies
    scaled = torch.where(lengths > length / low, frequencies / factor, frequencies)
    kept = (length / lengths - low) / (high - low)
    between = ~(lengths < length / high) & ~(lengths > length / low)
    return torch.where(between, (1 - kept) * scaled / factor + kept * scaled, scaled), 1.0


_NOT_READ = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_LENGTH = "original_max_position_embeddings"
# By rope_type: how, the keys that it needs, and those that it may have.
_KINDS: dict[str, tuple[Callable[..., tuple[Tensor, float]], tuple[str, ...], tuple[str, ...]]] = {
    "default": (_default, (), ()),
    "linear": (_linear, ("factor",), ()),
    "yarn": (
        _yarn,
        ("factor", _LENGTH),
        ("beta_fast", "beta_slow", "attention_factor", "truncate", "mscale", "mscale_all_dim"),
    ),
    "llama3": (_llama3, ("factor", _LENGTH, "low_freq_factor", "high_freq_factor"), ()),
}
