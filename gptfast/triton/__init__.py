"""The ops as Triton kernels: torch.ops.gptfast_triton.*, with the names and schemas of torch.ops.gptfast.

They serve GPUs for which no CUDA build exists (other NVIDIA generations, AMD), need no compiler at install time, and are
the readable twins of the CUDA kernels. Importing this package registers the operators; Triton itself is imported, and a
kernel compiled, when an operator first runs.

TRITON_INTERPRET=1, set before gptfast is imported, runs the kernels in Triton's interpreter on CPU tensors: slowly, for
tests and debugging. Its arithmetic on bfloat16 is wrong (Triton 3.6 to 3.9), so the kernels widen to float32 first; the
products of attention, which a GPU takes in bfloat16, are then taken in float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast import _schemas, backend
from gptfast.backend import Backend

NAMESPACE = "gptfast_triton"
INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
OLDEST_GPU = (7, 0)  # what Triton's compiler can make code for


def register() -> None:
    """Make the operators, and with them backend="triton"; for CPU tensors where they are interpreted, else for GPUs."""
    device = "cpu" if INTERPRETING else "cuda"
    library, modules = _schemas.library(NAMESPACE), implemented()
    _schemas.define(NAMESPACE, modules)
    for schema, module in modules.items():
        name = _schemas.name_of(schema)
        library.impl(name, _launcher(module, name), device.upper())
    backend.register(Backend("triton", NAMESPACE, device, unavailable_reason, automatic=not INTERPRETING))


def implemented() -> dict[str, str]:
    """The schemas that have a Triton kernel, and the module of this package whose function of that name is its launcher.

    Raises:
        ImportError: a module here bears the name of no operator.
    """
    modules = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    found: dict[str, str] = {}
    for file, schemas in _schemas.KERNELS.items():
        for schema in schemas:
            name = _schemas.name_of(schema)
            module = name if name in modules else file
            if module in modules:
                found[schema] = module
    for module in sorted(modules - set(found.values())):
        raise ImportError(f"gptfast/triton/{module}.py: gptfast/_schemas.py has no schema of {module}")
    return found


def _launcher(module: str, name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        function = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return function(*args)

    return launch


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (on Linux the GPU builds of torch bring it)"
    if INTERPRETING or torch.cuda.is_available():
        return None
    build = "" if torch.version.cuda or torch.version.hip else " (it is a CPU build)"
    return (
        f"torch sees no GPU{build}: install a GPU build of torch and the driver, or set TRITON_INTERPRET=1 before "
        "importing gptfast to run the kernels slowly on the CPU"
    )


missing_reason: str | None = _missing()
_reasons: dict[int, str | None] = {}


def unavailable_reason(index: int | None) -> str | None:
    """Why Triton kernels cannot run on GPU number `index` (None: the current one), and what to do; None where they can.

    The GPU is asked once, here and not at import: a process that has touched CUDA cannot fork workers.
    """
    if missing_reason is not None or INTERPRETING or torch.version.hip:
        return missing_reason
    index = torch.cuda.current_device() if index is None else index
    if index not in _reasons and torch.compiler.is_compiling():
        return None  # not a question that can be traced; the launch would say
    if index not in _reasons:
        capability = torch.cuda.get_device_capability(index)
        old = f"this GPU has compute capability {capability[0]}.{capability[1]} and Triton needs 7.0 or newer"
        _reasons[index] = None if capability >= OLDEST_GPU else old
    return _reasons[index]
