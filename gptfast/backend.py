"""Which implementation runs an op: the compiled library, loaded once, and the choice among the backends.

`auto` takes the first backend that can run the call. An explicit choice (argument, `gptfast.backend(...)` or
GPTFAST_BACKEND) never falls back: it raises with the cause and the remedy.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("auto", "cpu", "cuda", "triton", "eager")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (needs g++)"


def _load_ops() -> str | None:
    """Load the compiled ops; return why they are absent, or None."""
    path = Path(__file__).with_name("_ops.so")
    if not path.exists():
        return f"{path.name} was not built (GPTFAST_BUILD=0, or a source folder without a build)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    rejected = torch.ops.gptfast.cpu_rejected_isa()
    if rejected:
        usable = torch.ops.gptfast.cpu_isas().replace(",", ", ")
        raise ValueError(f"GPTFAST_CPU_ISA is {rejected!r}; this machine runs {usable}. Unset it or name one of these")
    return None


missing_reason: str | None = _load_ops()
has_cpu_ops: bool = missing_reason is None
if not has_cpu_ops:
    warnings.warn(
        f"gptfast: {missing_reason}; every op runs in eager PyTorch. To build: {_REBUILD}", RuntimeWarning, stacklevel=2
    )


def _checked(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: backend is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


_default: str = _checked(os.environ.get("GPTFAST_BACKEND", "auto") or "auto", "GPTFAST_BACKEND")


class _Local(threading.local):
    choice: str | None = None


_local = _Local()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every gptfast op called inside the `with`, in this thread.

    Args:
        name: "auto", "cpu", "cuda", "triton" or "eager".
    Raises:
        ValueError: unknown name.
    """
    previous, _local.choice = _local.choice, _checked(name, "gptfast.backend")
    try:
        yield
    finally:
        _local.choice = previous


def resolve(op: str, choice: str | None, x: Tensor) -> str:
    """The backend that runs `op` on `x`: "cpu" or "eager" (or "cuda", "triton" where they exist).

    Args:
        op: name for messages.
        choice: the call's `backend=` argument, or None for the surrounding choice.
        x: the op's main input.
    Raises:
        ValueError, TypeError, RuntimeError: the explicit choice cannot run this call.
    """
    name = choice or _local.choice or _default
    if name == "eager":
        return name
    if name == "auto":
        runs = has_cpu_ops and x.device.type == "cpu" and x.dtype in KERNEL_DTYPES
        return "cpu" if runs else "eager"
    _checked(name, op)
    _check_explicit(op, name, x)
    return name


def _check_explicit(op: str, name: str, x: Tensor) -> None:
    if name == "cpu" and not has_cpu_ops:
        raise RuntimeError(f"{op}: backend='cpu' was asked for, but {missing_reason}. To build: {_REBUILD}")
    if name in ("cuda", "triton"):
        raise RuntimeError(
            f"{op}: backend={name!r} was asked for, but this version of gptfast has no {name} kernels; "
            "use backend='auto' or 'eager'"
        )
    if x.device.type != name:
        raise ValueError(f"{op}: backend={name!r} was asked for, but the input is on {x.device}; move it or use 'auto'")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(
            f"{op}: backend={name!r} computes float32, bfloat16 and float16, got {x.dtype}; use backend='eager'"
        )


NAMESPACES = {"cpu": "gptfast", "cuda": "gptfast"}  # of torch.ops; there the device of the tensors decides


def kernels(name: str) -> Any:
    """The compiled ops of a backend, under the same names for all: `kernels("cpu").gelu_fwd`."""
    return getattr(torch.ops, NAMESPACES[name])


def cpu_isa() -> str | None:
    """Name of the instruction set that the CPU kernels use now, or None without compiled ops."""
    return torch.ops.gptfast.cpu_isa() if has_cpu_ops else None


def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine can run, worst first."""
    return torch.ops.gptfast.cpu_isas().split(",") if has_cpu_ops else []


@contextmanager
def force_cpu_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels of one instruction set inside the `with` (process-wide; for tests and benchmarks)."""
    if name not in cpu_isas():
        raise ValueError(f"force_cpu_isa: {name!r} cannot run here; available: {', '.join(cpu_isas()) or 'none'}")
    previous = cpu_isa()
    torch.ops.gptfast.set_cpu_isa(name)
    try:
        yield
    finally:
        torch.ops.gptfast.set_cpu_isa(previous)
