"""Who takes turns with an op: our kernels, PyTorch's, what torch.compile makes of these, Liger's where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from .timing import Bench, Run

Makers = dict[str, Callable[[], Run]]
Cases = dict[str, tuple[float, Makers]]  # name -> (least bytes, who takes turns)
PEERS = ("torch", "compile", "triton", "liger")


def backends(bench: Bench, run: Callable[[str], Run]) -> Makers:
    """Our own kernels: those of the backend and, where asked for, those in Triton."""
    triton: Makers = {"triton": lambda: run("triton")} if bench.triton else {}
    return {"gptfast": lambda: run(bench.backend), **triton}


def theirs(bench: Bench, f: Callable[..., Any], use: Callable[[Callable[..., Any]], Run]) -> Makers:
    """`use` of PyTorch's function f as it is, and compiled; on trial by a compiler that changes nothing."""
    how: dict[str, Any] = {"backend": "eager"} if bench.tiny else {}
    return {"torch": lambda: use(f), "compile": lambda: use(torch.compile(f, **how))}


def liger(make: Callable[[Any], Run]) -> Makers:
    """Liger's functions, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}

    def maker() -> Run:
        from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports] (optional)

        return make(functional)

    return {"liger": maker}
