"""Checks of single values: each raises an error that names the owner, the argument, what came and what was expected."""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch


def check_choice(op: str, name: str, got: object, choices: tuple[object, ...]) -> None:
    if got not in choices:
        raise ValueError(f"{op}: {name} is {got!r}; expected one of {', '.join(map(repr, choices))}")


def check_number(op: str, name: str, x: float) -> None:
    """`x` must be a number that a float holds; True is none."""
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat, Real)):
        raise TypeError(f"{op}: {name} is {x!r} ({type(x).__name__}); expected a number")
    if isinstance(x, int) and abs(x) > sys.float_info.max:
        raise ValueError(f"{op}: {name} is an int of {x.bit_length()} bits; expected a number that a float can hold")


def check_int(op: str, name: str, x: int, least: int = -(2**63), what: str = "") -> None:
    """`x` must be an int that an operator can take, and at least `least`; `what` says what it is good for."""
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt, Integral)):
        raise TypeError(f"{op}: {name} is {x!r} ({type(x).__name__}); expected an int{what}")
    if not least <= x < 2**63:
        raise ValueError(f"{op}: {name} is {x}; expected an int from {least} to 2**63 - 1{what}")


def check_probability(op: str, name: str, p: float) -> None:
    check_number(op, name, p)
    if not 0 <= p <= 1:  # also false for nan
        raise ValueError(f"{op}: {name} is {p}; expected a probability in [0, 1]")
