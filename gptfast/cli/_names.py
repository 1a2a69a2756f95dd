"""The names of parameters and the options of the command line that stand for them."""

from __future__ import annotations

import re
from collections.abc import Mapping

_QUOTED = re.compile(r"`([A-Za-z_]\w*)`")


def option_name(parameter: str) -> str:
    """The option of a parameter, such as --n-layer for n_layer."""
    return "--" + parameter.replace("_", "-")


def as_options(text: str, options: Mapping[str, str] | None = None) -> str:
    """The text with every `parameter` as its option.

    Args:
        options: the option of each parameter that is replaced; None: every parameter has one, named after it.
    """

    def option(match: re.Match[str]) -> str:
        return option_name(match[1]) if options is None else options.get(match[1], match[0])

    return _QUOTED.sub(option, text)
