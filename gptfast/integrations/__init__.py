"""Models of other packages on the ops of gptfast: `accelerate` patches a model in place, `restore` undoes it.

Importing this package imports neither transformers nor peft; what needs them is imported with the first model of theirs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.integrations.patch import accelerate, restore
    from gptfast.integrations.report import Report

__all__ = ["Report", "accelerate", "restore"]

_PLACES = {
    "accelerate": "patch",
    "restore": "patch",
    "Report": "report",
}  # imported when first used: torch takes seconds


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gptfast.integrations' has no attribute {name!r}")
    return getattr(import_module(f"gptfast.integrations.{_PLACES[name]}"), name)
