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


def check_ranges(config: Any) -> None:
    """Raise for a value of a GenerationConfig that is out of its range."""
    if config.temperature < 0:
        raise ValueError(f"generate: temperature is {config.temperature}; expected a number >= 0 (0 is greedy)")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"generate: top_p is {config.top_p}; expected 0 < top_p <= 1 (1 keeps all tokens)")
    if not 0 <= config.min_p <= 1:
        raise ValueError(f"generate: min_p is {config.min_p}; expected 0 <= min_p <= 1 (0 keeps all tokens)")
    if config.repetition_penalty <= 0:
        raise ValueError(
            f"generate: repetition_penalty is {config.repetition_penalty}; expected a number > 0 (1 is none)"
        )
    if config.diversity_penalty < 0:
        raise ValueError(f"generate: diversity_penalty is {config.diversity_penalty}; expected a number >= 0")
    if config.seed is not None:
        check_seed(config.seed)
    if not isinstance(config.early_stopping, bool) and config.early_stopping != "never":
        raise ValueError(f"generate: early_stopping is {config.early_stopping!r}; expected True, False or 'never'")
    if config.overflow not in ("error", "slide"):
        raise ValueError(f"generate: overflow is {config.overflow!r}; expected 'error' or 'slide'")
