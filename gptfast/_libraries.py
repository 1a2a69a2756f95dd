"""The compiled libraries of ops: importing this loads _ops.so, and _cuda_ops.so where torch sees a GPU."""

from __future__ import annotations

from pathlib import Path

import torch

from gptfast import _schemas
from gptfast._warn import warn

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps . (needs g++)"


def _load_ops() -> str | None:
    """Load the compiled ops; return why they are absent, or None."""
    path = Path(__file__).with_name("_ops.so")
    if not path.exists():
        return f"{path.name} was not built (GPTFAST_BUILD=0, or a source folder without a build)"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    schemas = (*_schemas.compiled("cpu"), *_schemas.CPU_LIBRARY)
    _schemas.define("gptfast", schemas)
    _schemas.check_library("gptfast", "cpu", schemas, path)
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
    path = Path(__file__).with_name("_cuda_ops.so")
    if not has_cpu_ops:
        return missing_reason
    if not path.exists():
        return f"{path.name} was not built: rebuild where nvcc is found, with GPTFAST_CUDA=1"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    _schemas.define("gptfast", _schemas.CUDA_LIBRARY)
    _schemas.check_library("gptfast", "cuda", (*_schemas.compiled("cuda"), *_schemas.CUDA_LIBRARY), path)
    return None


missing_cuda_reason: str | None = _load_cuda_ops()
