"""One file an op: inputs, least work, cases, and torch's own function. Importing this package collects them into SPECS."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from gptfast.testing.case import SPECS

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    SPECS[_module] = import_module(f"{__name__}.{_module}").SPEC
