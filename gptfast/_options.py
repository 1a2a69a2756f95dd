"""Options: the fields of a configuration with their descriptions and allowed values.

A field is described once, where it is declared. From there come the checks of its values, the documentation of its class
(`describe_fields`) and the options of the command line (`gptfast.cli._options`).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gptfast._checks import check_count, check_real

T = TypeVar("T", bound=type)
_KEY = "option"
_BOOLS = {"bool": bool, "bool | None": (bool, type(None))}  # by annotation


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `least` to `most`; None: no upper bound."""

    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Real:
    """Finite numbers in a range.

    least, above: the lower bound, included or not.
    most, below: the upper bound, included or not.
    example: follows the range in messages, such as "1e-3".
    noun: the name of the numbers in messages.
    """

    least: float | None = None
    above: float | None = None
    below: float = math.inf
    example: str = ""
    most: float | None = None
    noun: str = "a number"

    def __contains__(self, value: float) -> bool:
        lower = value >= self.least if self.least is not None else self.above is None or value > self.above
        return lower and -math.inf < value < self.below and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        low = self.least or self.above or 0
        if self.below < math.inf or self.most is not None:
            high = f"{self.below:g})" if self.most is None else f"{self.most:g}]"
            text = f"{self.noun} in {'[' if self.above is None else '('}{low:g}, {high}"
        else:
            text = f"{self.noun} {'>' if self.least is None else '>='} {low:g}"
        return text + (f", such as {self.example}" if self.example else "")


@dataclass(frozen=True)
class Option:
    """The description of a field.

    help: what the value decides: its unit and range, in one to three sentences. Names of other fields stand in
        `backquotes`.
    default: the default in words, where the value does not tell it ("{}" stands for the value); "": the value.
    allowed: the range of a number, or the choices of a text; None: not checked here.
    group: heading on the command line.
    """

    help: str
    default: str = ""
    allowed: Whole | Real | tuple[str, ...] | None = None
    group: str = ""


def option(
    default: Any,
    help: str,
    *,
    words: str = "",
    allowed: Whole | Real | tuple[str, ...] | None = None,
    group: str = "",
) -> Any:
    """A field of a dataclass, described: see `Option`; `words` is its `default`."""
    return field(default=default, metadata={_KEY: Option(help, words, allowed, group)})


def device_option(group: str = "") -> Any:
    """The field `device` of a configuration; `gptfast.machine.resolve_device` reads it."""
    return option("auto", "cpu, cuda, cuda:1, ..., or auto: cuda where there is a GPU.", group=group)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name, `InitVar`s among them; fields without a description are left out."""
    return {name: f.metadata[_KEY] for name, f in _fields(cls) if _KEY in f.metadata}


def values_of(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are described fields of a configuration."""
    return {name: value for name, value in options.items() if name in options_of(cls)}


def default_of(cls: type, name: str) -> Any:
    """The default value of a field."""
    return cls.__dataclass_fields__[name].default


def default_text(described: Option, value: Any) -> str:
    """A default in words: those of the option, else the value; "" where None only says that there is none."""
    if described.default:
        return described.default.replace("{}", format_value(value))
    return "" if value is None else format_value(value)


def format_value(value: Any) -> str:
    """A value as help texts show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_fields(cls: T) -> T:
    """A class decorator: appends the descriptions of the fields to the docstring of a dataclass."""
    lines = []
    for name, described in options_of(cls).items():
        default = default_text(described, default_of(cls, name))
        text = f"{name}: {described.help}" + (f" Default: {default}." if default else "")
        lines += textwrap.wrap(text, 116, initial_indent=" " * 8, subsequent_indent=" " * 12)
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "    Args:", *lines, ""])
    return cls


def check_fields(owner: str, config: Any) -> None:
    """Check the values of a configuration against the ranges and choices of its options.

    Args:
        owner: begins the messages.
        config: a dataclass. None is allowed where the annotation of a field ends with "| None".
    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value that is not allowed.
    """
    for name, f in _fields(type(config)):
        value, allowed = getattr(config, name), f.metadata[_KEY].allowed if _KEY in f.metadata else None
        if allowed is not None:
            _check(owner, name, value, allowed, str(f.type).endswith("| None"))
        elif not isinstance(value, _BOOLS.get(str(f.type), object)):
            raise TypeError(f"{owner}: {name} is {value!r}; expected True or False")


def _check(owner: str, name: str, value: Any, allowed: Whole | Real | tuple[str, ...], optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(allowed, tuple):
        if value not in allowed:
            raise ValueError(f"{owner}: {name} is {value!r}; expected one of {', '.join(allowed)}")
    elif isinstance(allowed, Whole):
        check_count(owner, name, value, allowed.least, allowed.most, " or None" if optional else "")
    else:
        check_real(owner, name, value, str(allowed), allowed.__contains__)


def _fields(cls: type) -> Iterator[tuple[str, Any]]:
    yield from cls.__dataclass_fields__.items()
