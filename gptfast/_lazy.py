"""Lazy attributes of packages: a module is imported when one of its names is first used (PEP 562)."""

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
