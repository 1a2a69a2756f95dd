"""Names that are imported when they are first used: attributes of packages (PEP 562), and what stands above its user."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names are imported on first use.

    Importing torch takes seconds. `gptfast --help` reads the configurations of training and generation, and must not wait
    for it. No name may be that of a submodule: importing the submodule would hide it.

    Args:
        package: `__name__` of the package.
        modules: the module of each public name, such as {"Trainer": "gptfast.training.trainer"}.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names


_provided: dict[str, Callable[[], Any]] = {}


def provide(name: str, get: Callable[[], Any]) -> None:
    """Let a package use what stands above it and cannot be imported there: `get()` imports and returns it."""
    _provided[name] = get


def provided(name: str) -> Any:
    """What `gptfast/__init__.py` provides under this name."""
    return _provided[name]()
