"""Checks of single values. Each raises an error that names the owner, the argument, what came and what was expected.

Values of operators, which torch.compile may trace, have their checks in `gptfast.ops._checks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def check_choice(owner: str, name: str, got: object, choices: tuple[object, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{owner}: {name} is {got!r}; expected one of {', '.join(map(repr, choices))}")


def check_count(owner: str, name: str, value: Any, least: int = 1, most: int | None = None, what: str = "") -> None:
    """`value` must be an int from `least` to `most` (None: no limit); True is none.

    what: ends the messages about the type and about `most`.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; expected an int{what}")
    if value < least:
        raise ValueError(f"{owner}: {name} is {value}; expected at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{owner}: {name} is {value}; expected at most {most}{what}")


def check_real(owner: str, name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> None:
    """`value` must be an int or a float for which `holds` is true; `expected` says the same in words."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} is {value!r}; expected {expected}")
    if not holds(value):
        raise ValueError(f"{owner}: {name} is {value}; expected {expected}")
