"""Checks of the values of a `GenerationConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptfast._checks import check_count

LARGEST = (2 - 2**-23) * 2.0**127  # scores are fp32


def check_int(name: str, value: Any, least: int) -> None:
    check_count("generate", name, value, least, 2**63 - 1)


def check_seed(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"generate: seed is {value!r} ({type(value).__name__}); expected a Python int")
    if not 0 <= value < 2**64:
        raise ValueError(f"generate: seed is {value}; expected 0 <= seed < 2**64")


def check_number(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"generate: {name} is {value!r}; expected a number")
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"generate: {name} is {value}; expected a finite number, in the range of 32 bits")


def checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise TypeError(f"generate: logit_bias is a {type(bias).__name__}; expected {{token id: number}}")
    for token, value in bias.items():
        check_int("a token of logit_bias", token, 0)
        if not (isinstance(value, (int, float)) and value < -LARGEST):
            check_number(f"logit_bias[{token}]", value)
    return {token: value if value >= -LARGEST else -math.inf for token, value in bias.items()}


def checked_tokens(tokens: Any) -> tuple[int, ...] | None:
    if not isinstance(tokens, (list, tuple)):
        raise TypeError(f"generate: suppress_tokens is {tokens!r}; expected a list of token ids")
    for token in tokens:
        check_int("a token of suppress_tokens", token, 0)
    return tuple(dict.fromkeys(tokens)) or None
