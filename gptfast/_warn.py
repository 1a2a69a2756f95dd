"""Warnings that name the line of the user's code from which gptfast was called."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the nearest caller outside the package and the import system."""
    frame = nearest = sys._getframe(1)
    while frame is not None and _is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or nearest
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    name = frame.f_globals.get("__name__", "?")
    warnings.warn_explicit(text, category, frame.f_code.co_filename, frame.f_lineno, name, registry)


def _is_inside(file: str) -> bool:
    return file.startswith((_PACKAGE, "<frozen ")) or Path(file).parent.name == "importlib"
