"""The compiled libraries of ops: importing this loads _ops.so, and _cuda_ops.so where torch sees a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast import _schemas
from gptfast._warn import warn

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (needs g++)"


def _load(name: str, device: str, shared: Sequence[str], own: Sequence[str], remedy: str) -> str | None:
    """Load a library and compare it with its schemas; return why it is absent, or None.

    Args:
        name: of its file, beside this one.
        device: of the tensors that its kernels are for, "cpu" or "cuda".
        shared: schemas of kernels that are defined already. own: those that it alone implements; they are defined here.
        remedy: ends the message of a file that is missing.
    Raises:
        ImportError: the library was built from other sources.
    """
    path = Path(__file__).with_name(name)
    if not path.exists():
        return f"{name} was not built{remedy}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{name} does not load with torch {torch.__version__}: {error}"
    _schemas.define("gptfast", own)
    _schemas.check_library("gptfast", device, (*shared, *own), path)
    return None


def _load_ops() -> str | None:
    """Load the compiled ops; return why they are absent, or None. Raises ValueError for a wrong GPTFAST_CPU_ISA."""
    own = (*_schemas.compiled("cpu"), *_schemas.CPU_LIBRARY)
    missing = _load("_ops.so", "cpu", (), own, " (GPTFAST_BUILD=0, or a source folder without a build)")
    if missing:
        return missing
    rejected = torch.ops.gptfast.cpu_rejected_isa()
    if rejected:
        usable = torch.ops.gptfast.cpu_isas().replace(",", ", ")
        raise ValueError(f"GPTFAST_CPU_ISA is {rejected!r}; this machine runs {usable}. Unset it or name one of these")
    return None


missing_reason: str | None = _load_ops()
has_cpu_ops: bool = missing_reason is None
if not has_cpu_ops:
    warn(f"gptfast: {missing_reason}; every op runs in eager PyTorch. To build: {REBUILD}", RuntimeWarning)


def _load_cuda_ops() -> str | None:
    """Load the CUDA ops where torch sees a GPU; return why they are absent, or None."""
    if not torch.cuda.is_available():
        return "torch sees no GPU" + ("" if torch.version.cuda else " (it is a CPU build)")
    if not has_cpu_ops:
        return missing_reason  # it defines the schemas that both libraries implement
    remedy = ": rebuild where nvcc is found, with GPTFAST_CUDA=1"
    return _load(
        "_cuda_ops.so", "cuda", _schemas.compiled("cuda"), (*_schemas.CUDA_KERNELS, *_schemas.CUDA_LIBRARY), remedy
    )


missing_cuda_reason: str | None = _load_cuda_ops()
